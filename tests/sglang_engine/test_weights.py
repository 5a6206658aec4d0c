"""A running server's weights do not change under its banks and sessions (fault 14)."""

from __future__ import annotations

import pytest

from tests.support.memory_scenarios import PROMPTS
from tests.support.server import ids

LOOKS = {
    "check_weights",
    "destroy_weights_update_group",
    "get_weights_by_name",
    "init_weight_update",
    "init_weights_send_group_for_remote_instance",
    "init_weights_update_group",
    "send_weights_to_remote_instance",
    "update_weight_version",
}
"""Methods about weights that leave them as they are; ``check_weights`` can change them, and then it is refused."""


def test_fault14_every_method_of_sglang_s_that_speaks_of_weights_is_refused_or_known_to_look():
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    from mem_triton_sglang.tokenizer_manager import TokenizerManagerWithMemory as Ours

    named = {
        name
        for name in dir(TokenizerManager)
        if "weight" in name and not name.startswith("_") and callable(getattr(TokenizerManager, name))
    }
    assert {"update_weights_from_disk", "begin_weight_update"} <= named
    for name in named - LOOKS | {"release_memory_occupation", "check_weights"}:
        assert getattr(Ours, name) is not getattr(TokenizerManager, name), name


@pytest.mark.engine
def test_fault14_a_server_keeps_its_weights_and_says_why(memory_bench, start_server):
    server = start_server(memory_bench.model, memory_bench.section())
    before = server.tokens(PROMPTS[0], fields=ids("alpha"))
    for path, body in (
        ("update_weights_from_disk", {"model_path": str(memory_bench.model)}),
        ("update_weights_from_tensor", {"serialized_named_tensors": []}),
        ("update_weights_from_distributed", {"names": [], "dtypes": [], "shapes": []}),
        ("update_weights_from_ipc", {"zmq_handles": {}}),
        ("begin_weight_update", {}),
        ("end_weight_update", {}),
        ("release_memory_occupation", {}),
        ("release_memory_occupation", {"tags": ["weights"]}),
        ("weights_checker", {"action": "reset_tensors"}),
    ):
        response = server.http.post(f"/{path}", json=body)
        assert response.status_code == 400 and "is refused" in response.text, f"{path}: {response.text}"
    assert server.http.post("/weights_checker", json={"action": "checksum"}).status_code == 200
    assert server.tokens(PROMPTS[0], fields=ids("alpha")) == before == memory_bench.after(PROMPTS[0], "alpha")
