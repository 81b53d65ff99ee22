"""Writing results so that a good one is never lost: files whole or not at all, model folders by a journal."""

from hf_zipit.files.atomic import replacing, write_json, write_text
from hf_zipit.files.checks import check_result_folder, check_writable
from hf_zipit.files.folder import adding_to, recover

__all__ = [
    "adding_to", "check_result_folder", "check_writable", "recover", "replacing", "write_json", "write_text",
]  # fmt: skip
