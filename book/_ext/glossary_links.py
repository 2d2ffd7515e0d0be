"""Lead back from the glossary: under each entry stand the sections whose text names the
term with `{term}`.

So a link from a page to the glossary is enough to have the link from the glossary to
the page.
"""

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

GLOSSARY = "book/glossary"


def _collect(app: Sphinx, doctree: nodes.document) -> None:
    """Note in which section of a page each term stands first."""
    first: dict[str, tuple[str, str]] = {}
    for reference in doctree.findall(addnodes.pending_xref):
        if reference["reftype"] != "term":
            continue
        section = reference.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        first.setdefault(
            reference["reftarget"].lower(),
            (section["ids"][0], section.next_node(nodes.title).astext()),
        )
    _uses(app.env)[app.env.docname] = first


def _uses(env: BuildEnvironment) -> dict[str, dict[str, tuple[str, str]]]:
    if not hasattr(env, "glossary_uses"):
        env.glossary_uses = {}
    return env.glossary_uses


def _forget(app: Sphinx, env: BuildEnvironment, page: str) -> None:
    _uses(env).pop(page, None)


def _merge(
    app: Sphinx, env: BuildEnvironment, pages: set[str], other: BuildEnvironment
) -> None:
    _uses(env).update(
        {page: used for page, used in _uses(other).items() if page in pages}
    )


def _write_anew(app: Sphinx, env: BuildEnvironment) -> list[str]:
    # Its own text has not changed, but what other pages say of it may have.
    return [GLOSSARY] if GLOSSARY in env.found_docs else []


def _lead_back(app: Sphinx, doctree: nodes.document, page: str) -> None:
    if page != GLOSSARY:
        return
    uses = _uses(app.env)
    for item in doctree.findall(nodes.definition_list_item):
        terms = {term.astext().lower() for term in item.findall(nodes.term)}
        links = []
        for other in sorted(uses.keys() - {page}):
            for term in terms & uses[other].keys():
                section, title = uses[other][term]
                address = f"{app.builder.get_relative_uri(page, other)}#{section}"
                where = app.env.titles[other].astext()
                text = (
                    where if where == title else f"{where.partition(':')[0]}: {title}"
                )
                links += [
                    nodes.Text("; " if links else "→ "),
                    nodes.reference("", text, refuri=address, internal=True),
                ]
        if links:
            item.next_node(nodes.definition).append(
                nodes.paragraph("", "", *links, classes=["glossary-uses"])
            )


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", _collect)
    app.connect("env-purge-doc", _forget)
    app.connect("env-merge-info", _merge)
    app.connect("env-updated", _write_anew)
    app.connect("doctree-resolved", _lead_back)
    return {
        "version": "1",
        "env_version": 1,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
