"""Checks on the site as it is built: it must work where there is no network."""

import re
from typing import Any

from mkdocs.exceptions import PluginError

# Whatever a browser would fetch by itself.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preconnect|icon)[^>]*href=["']?(?:https?:)?//"""
)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuse a page that loads something from another host."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_path}: loads from a network: {found[0]}")
    return output
