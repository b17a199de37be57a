"""The edge: the detached model answers what it can, a policy decides, a cloud over HTTP answers the rest."""
