"""
Take the files into the site that pages link to outside docs/, and let the links lead there.

In the repository, pages link to each other and to files beside docs/ (`../SECURITY.md`, `../examples/finetune.py`), so
that they can be read where the code is. In the site, docs/ is the root and the other files keep their paths; README.md
is the home page. Links in pages are rewritten to match.
"""

import posixpath
import re
from pathlib import Path

from properdocs.structure.files import File, InclusionLevel


ROOT = Path(__file__).resolve().parent.parent.parent
HOME = {"README.md": "index.md"}
IN_NAVIGATION = ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.MULTILINE | re.DOTALL)


def path_in_site(path: str) -> str:
    """Return where a file of the repository is in the site."""
    return HOME.get(path, path.removeprefix("docs/"))


def path_in_repository(uri: str) -> str:
    """Return which file of the repository a file of the site is."""
    homes = {site: path for path, site in HOME.items()}
    inside = f"docs/{uri}"
    return homes.get(uri, inside if (ROOT / inside).exists() else uri)


def target_of(link: re.Match[str], page: str) -> str:
    """Return the file of the repository that a link in a page leads to; a folder's is its README."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link["target"]))
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def outside_code(function, markdown: str) -> str:
    """Apply a function to the parts of a page that are not code."""
    parts = CODE.split(markdown)
    return "".join(part if index % 2 else function(part) for index, part in enumerate(parts))


def on_files(files, config):
    """Add README.md, the pages of the navigation and all that is linked to from one of them."""
    sources = {path_in_repository(file.src_uri) for file in files.documentation_pages()}
    waiting = [*sources, *IN_NAVIGATION]
    while waiting:
        path = waiting.pop()
        uri = path_in_site(path)
        if files.get_file_from_path(uri) is None:
            is_aside = path.endswith(".md") and path not in IN_NAVIGATION
            inclusion = InclusionLevel.NOT_IN_NAV if is_aside else InclusionLevel.INCLUDED
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / path), inclusion=inclusion))
            sources.add(path)
        elif path not in sources:
            continue
        if path.endswith(".md"):
            text = CODE.sub("", (ROOT / path).read_text(encoding="utf-8"))
            targets = {target_of(link, path) for link in LINK.finditer(text)}
            new = {target for target in targets - sources if (ROOT / target).is_file()}
            waiting += sorted(target for target in new if files.get_file_from_path(path_in_site(target)) is None)
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page from paths in the repository to paths in the site, and rank it for the search."""
    path = path_in_repository(page.file.src_uri)
    if page.file.inclusion.is_not_in_nav():
        page.meta["search"] = {"exclude": True}
    elif re.fullmatch(r"docs/\w+\.md", path):  # the pages of tasks come before the reference and the project
        page.meta["search"] = {"boost": 3}

    def rewritten(link: re.Match[str]) -> str:
        target = path_in_site(target_of(link, path))
        return posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or ".") + (link["anchor"] or "")

    return outside_code(lambda text: LINK.sub(rewritten, text), markdown)
