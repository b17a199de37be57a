"""Settings that users write, their validation, and their files. Depends on no other package of shadowtune."""
