"""Run the notebooks of docs/ and keep what they show. Needs the extra `docs`.

Usage: python -m scripts.run_notebooks
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    import nbformat
    from nbclient import NotebookClient

    for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        # In a folder of its own, so that what a notebook writes does not stay.
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(ROOT / "examples", Path(folder) / "examples")
            client = NotebookClient(book, timeout=1800, resources={"metadata": {"path": folder}})
            client.execute()
        for cell in book.cells:
            cell.metadata = {}
            # Progress of loading and the like is no result.
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
                for shown in cell.outputs:
                    shown.get("data", {}).pop("image/jpeg", None)  # the same once more
        book.metadata = {"kernelspec": book.metadata.kernelspec}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
