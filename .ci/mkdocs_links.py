"""MkDocs hooks: the README is the start page, and links out of docs/ lead to the repository or become plain text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\(\.\./([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the start page, unless docs/ has one, and the images of benchmarks/results."""
    if files.get_file_from_path("index.md") is None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        text = re.sub(r"\]\((?!https?:|#|mailto:)", "](../", text).replace("](../docs/", "](")
        files.append(File.generated(config, "index.md", content=text))
    for image in (ROOT / "benchmarks" / "results").glob("*.png"):
        files.append(File.generated(config, f"benchmarks/results/{image.name}", abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Replace links to files outside of docs/; raises FileNotFoundError for a file that is not there."""

    def replace(match: re.Match[str]) -> str:
        image, text, path, anchor = match.groups()
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{page.file.src_path} links to {path}, which does not exist")
        if files.get_file_from_path(path) is not None:
            return f"{image}[{text}]({path})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path}{anchor or ''})"
        return text

    return markdown if page.file.src_path.startswith("api/") else LINK.sub(replace, markdown)
