"""A store and two vLLM engines that share it: the second loads what the first computed.

    python examples/vllm_store.py [MODEL]

Needs vLLM 0.32, the extra ``[serve]``, and redis-server or valkey-server. Prints the seconds to the first token of a
prompt, computed and loaded, and how many of its tokens came from the store. The first run compiles the kernels.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

MODEL = Path(__file__).parent / "tiny-lm"
PORT = 16390
CHUNK, LONGEST = 256, 120  # tokens of a chunk; seconds until all are stored, the first time with compiling the kernels
PROMPT, LEAST = 900, 20  # tokens of the prompt; of one that only warms the engine up


def main(model: str) -> None:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        sys.exit("neither redis-server nor valkey-server is installed: apt-get install redis-server")
    options = ["--port", str(PORT), "--save", "", "--maxmemory", "1gb", "--maxmemory-policy", "allkeys-lru"]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as server:
        try:
            for _ in ("computed", "loaded"):
                subprocess.run([sys.executable, __file__, model, "engine"], check=True)
        finally:
            server.terminate()


def engine(model: str) -> None:
    """Answer one prompt; the store is asked before, and filled behind it."""
    import redis
    from vllm import LLM, SamplingParams

    transfer = {
        "kv_connector": "KVCompConnector",
        "kv_connector_module_path": "kvcomp.integrations.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"url": f"redis://127.0.0.1:{PORT}"},
    }
    llm = LLM(
        model=model,
        block_size=64,
        max_model_len=1024,
        kv_cache_memory_bytes=256 << 20,
        kv_transfer_config=transfer,
        disable_hybrid_kv_cache_manager=True,
        disable_log_stats=False,
        enforce_eager=True,
    )
    one = SamplingParams(max_tokens=1, temperature=0)
    llm.generate({"prompt_token_ids": list(range(4, 4 + LEAST))}, one, use_tqdm=False)
    begin = time.perf_counter()
    llm.generate({"prompt_token_ids": list(range(4, 4 + PROMPT))}, one, use_tqdm=False)
    seconds = time.perf_counter() - begin
    hits = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:external_prefix_cache_hits")
    print(f"kvcomp: {seconds:.2f} s to the first token, {hits} of {PROMPT} tokens from the store", flush=True)
    store, end = redis.Redis(port=PORT), time.monotonic() + LONGEST
    while store.dbsize() < PROMPT // CHUNK and time.monotonic() < end:  # chunks are stored behind the answer
        time.sleep(0.5)


if __name__ == "__main__":
    given = [*sys.argv[1:], str(MODEL)][0]
    engine(given) if sys.argv[2:] == ["engine"] else main(given)
