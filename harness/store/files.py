"""Moved to harness.data.files; here until nothing imports it any more."""

from harness.data.files import (  # noqa: F401
    CACHE_VARIABLE,
    atomic_path,
    cache_dir,
    canonical,
    digest,
    file_sha256,
    locked,
    read_json,
    sync_dir,
    write_json,
    write_text,
)
