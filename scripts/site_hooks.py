"""Hooks of the documentation site (mkdocs.yml).

mkdocs sees docs/ alone. What pages link to outside of it (results, cards, the changelog) becomes
part of the site under repo/, notebooks become pages, and reference.md gets the docstrings. So links
are right in the repository and on the site, and `--strict` checks all of them.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")
REFERENCE = "reference.md"
ALSO = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
_sources: dict[str, str] = {}  # by the site's path, the repository's


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def links(path: Path) -> Iterator[tuple[str, str, str]]:
    """Relative links of a page: as written, the target from the root, the anchor."""
    here = path.relative_to(ROOT).parent.as_posix()
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S)
    for written, anchor in LINK.findall(text):
        yield written, posixpath.normpath(posixpath.join(here, written)), anchor


def site_path(source: str) -> str:
    """Where a file of the repository is on the site."""
    if source.startswith("docs/"):
        return source.removeprefix("docs/").replace(".ipynb", ".md")
    return f"repo/{source}"


def outside() -> list[str]:
    """Files outside of docs/ that pages lead to, from the root."""
    found, todo = set(ALSO), [*(ROOT / "docs").glob("*.md"), *(ROOT / name for name in ALSO)]
    while todo:
        for _, target, _ in links(todo.pop()):
            if not target.startswith("docs/") and target not in found and (ROOT / target).is_file():
                found.add(target)
                if target.endswith(".md"):
                    todo.append(ROOT / target)
    return sorted(found)


def notebook(path: Path) -> str:
    """A notebook as a page: text, code, and what the code has shown."""
    out = []
    for cell in json.loads(path.read_text())["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out += [text, ""]
            continue
        out += ["```python", text, "```", ""]
        for shown in cell["outputs"]:
            data = shown.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                out += [f"![output](data:image/png;base64,{picture})", ""]
            else:
                words = shown.get("text") or data.get("text/plain") or []
                out += ["```text", "".join(words).rstrip("\n"), "```", ""]
    return "\n".join(out)


def on_config(config):
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files, config):
    from mkdocs.structure.files import File, InclusionLevel

    _sources.clear()
    for path in (ROOT / "docs").rglob("*.md"):
        source = path.relative_to(ROOT).as_posix()
        _sources[site_path(source)] = source
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        source = path.relative_to(ROOT).as_posix()
        _sources[site_path(source)] = source
        files.append(File.generated(config, site_path(source), content=notebook(path)))
    for source in outside():
        made = File.generated(config, site_path(source), abs_src_path=str(ROOT / source))
        if source not in ALSO:  # reached by links alone
            made.inclusion = InclusionLevel.NOT_IN_NAV
        _sources[made.src_uri] = source
        files.append(made)
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    here = page.file.src_uri
    source = _sources[here]

    def moved(found: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        if not (ROOT / target).is_file():
            return found[0]  # mkdocs says so
        path = posixpath.relpath(site_path(target), posixpath.dirname(here) or ".")
        return f"]({path}{found[2] or ''})"

    text = LINK.sub(moved, markdown)
    if here == REFERENCE:
        from scripts.api_doc import page as reference

        text += "\n" + reference()
    return text
