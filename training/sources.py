"""Which packages the training text comes from, pinned. Knows no parsing and no splitting.

Only public-domain and permissive licences, so that nothing shipped depends on a copyleft text.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SOURCES", "Source"]


@dataclass(frozen=True, slots=True)
class Source:
    """One Debian package: what to read in it and what to leave."""

    package: str
    version: str
    licence: str
    root: str
    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()


SOURCES = (
    Source(
        "sqlite3-doc",
        "3.40.1-2+deb12u2",
        "public domain",
        "usr/share/doc/sqlite3",
        ("*.html", "c3ref/*.html", "session/*.html"),
        (
            "*/syntax/*",
            "*/releaselog/*",
            "*/hlr*",
            "*/changes.html",
            "*/keyword_index.html",
            "*/sitemap.html",
            "*/doclist.html",
            "*/toc_db.html",
        ),
    ),
    Source(
        "postgresql-doc-15",
        "15.20-0+deb12u1",
        "PostgreSQL licence",
        "usr/share/doc/postgresql-doc-15/html",
        ("*.html",),
        ("*/release-*", "*/bookindex.html", "*/errcodes-*", "*/biblio.html", "*/acronyms.html"),
    ),
    Source(
        "python3.11-doc",
        "3.11.2-6+deb12u9",
        "PSF-2.0",
        "usr/share/doc/python3.11/html",
        ("*.html", "*/*.html"),
        ("*/genindex*", "*/_modules/*", "*/changelog.html", "*/contents.html", "*/py-modindex.html"),
    ),
    Source(
        "apache2-doc",
        "2.4.71-1~deb12u1",
        "Apache-2.0",
        "usr/share/doc/apache2-doc/manual/en",
        ("*.html", "*/*.html"),
        ("*/sitemap.html", "*/mod/directives.html", "*/mod/quickreference.html"),
    ),
    Source(
        "python-django-doc",
        "3:3.2.25-0+deb12u7",
        "BSD-3-Clause",
        "usr/share/doc/python-django-doc/html",
        ("*.html", "*/*.html", "*/*/*.html", "*/*/*/*.html"),
        ("*/_modules/*", "*/genindex*", "*/contents.html", "*/releases/*", "*/py-modindex.html"),
    ),
    Source(
        "python-sqlalchemy-doc",
        "1.4.46+ds1-1",
        "MIT",
        "usr/share/doc/python-sqlalchemy-doc/html",
        ("*.html", "*/*.html", "*/*/*.html"),
        ("*/genindex*", "*/changelog/changelog*", "*/_modules/*"),
    ),
    Source(
        "llvm-15-doc",
        "1:15.0.6-4",
        "Apache-2.0 with LLVM exception",
        "usr/share/doc/llvm-15-doc/html",
        ("*.html", "*/*.html", "*/*/*.html"),
        ("*/AMDGPU/*", "*/genindex*", "*/AMDGPUOperandSyntax.html"),
    ),
    Source(
        "rust-doc",
        "1.63.0+dfsg1-2",
        "MIT or Apache-2.0",
        "usr/share/doc/rust-doc/html",
        (
            "book/*.html",
            "reference/*.html",
            "reference/*/*.html",
            "nomicon/*.html",
            "rustc/*.html",
            "rustdoc/*.html",
            "cargo/*.html",
            "cargo/*/*.html",
            "edition-guide/*.html",
            "edition-guide/*/*.html",
            "embedded-book/*.html",
            "embedded-book/*/*.html",
        ),
        ("*/print.html",),
    ),
    Source(
        "cmake-doc",
        "3.25.1-1",
        "BSD-3-Clause",
        "usr/share/doc/cmake-data/html",
        ("manual/*.html", "guide/*/*.html", "command/*.html", "module/*.html", "policy/*.html"),
        ("*/manual/cmake-policies.7.html",),
    ),
    Source(
        "perl-doc",
        "5.36.0-7+deb12u4",
        "Artistic-1.0-Perl or GPL-1+ (used under Artistic)",
        "usr/share/perl/5.36.0/pod",
        ("*.pod",),
        ("*delta.pod", "*/perltoc.pod", "*/perlhist.pod", "*/perlcn.pod", "*/perl[jkt][opw].pod"),
    ),
)
