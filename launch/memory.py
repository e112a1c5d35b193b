"""Peak memory of a federation in training, measured, against what `tap-jax describe` predicts (Linux, on the CPU).

Every client of the federation takes part once, two a round and one step each, so that in the end all have personal
blocks of their own. Measured is the largest resident memory of the process during those rounds, so host and device
together (here they are one), less what a federation of the same shape but of tiny width needs: interpreter, libraries,
compiled programs. Activations are what is added by a second sample in a row, measured in another process.
"""

import argparse
import ctypes
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

TINY = {"model.width": 24, "model.mlp": 32, "model.vocab": 600, "model.text_inner": 32, "model.head_hidden": (8, 8)}
COHORT = 2


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--config", nargs="+", default=["configs/flava.py", "configs/vilt.py"])
    options.add_argument("--child", default="", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.child:
        print(json.dumps(child(**json.loads(chosen.child))), flush=True)
        return
    for config in chosen.config:
        whole = measure(config, microbatch=1, rounds=0)
        more = measure(config, microbatch=2, rounds=5)
        tiny = measure(config, microbatch=1, rounds=5, tiny=True)
        # After as many rounds, with cohorts of the same patterns.
        activations = more["peaks"][4] - whole["peaks"][4]
        found = whole["peaks"][-1] - tiny["peaks"][-1]
        measured, planned = found - activations, whole["planned"]
        print(
            f"\n{config}: {whole['clients']} clients, {COHORT} in training, MB (10^6 bytes)\n"
            f"  peak of the process in the rounds   {whole['peaks'][-1] / 1e6:10,.0f}\n"
            f"  less that of a tiny model           {tiny['peaks'][-1] / 1e6:10,.0f}\n"
            f"  less activations of one sample      {activations / 1e6:10,.0f}\n"
            f"  = measured                          {measured / 1e6:10,.0f}\n"
            f"  described                           {planned / 1e6:10,.0f}   {planned / measured:.3f} of it\n"
            f"  peak before the rounds              {whole['before'] / 1e6:10,.0f}\n"
            f"  in arrays and models after them     {whole['held'] / 1e6:10,.0f}",
            flush=True,
        )


def measure(config: str, **fields) -> dict:
    """What `child` finds in a process of its own."""
    print(f"{config}: {fields}", file=sys.stderr, flush=True)
    arguments = json.dumps({"path": config, **fields})
    done = subprocess.run(
        [sys.executable, __file__, "--child", arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def child(path: str, microbatch: int, rounds: int, tiny: bool = False) -> dict:
    """Plays `rounds` rounds, or until every client has taken part -> peaks after each, in bytes."""
    import jax

    from tap_jax import experiment
    from tap_jax.cli import startup
    from tap_jax.config import load_config, override
    from tap_jax.engine.memory_plan import ROUND, array_bytes
    from tap_jax.planning.outline import outline
    from tap_jax.planning.planned_memory import plan

    fields = {"data.root": "synthetic", "data.train_size": 12, "data.test_size": 2, "model.weights": ""}
    fields |= {"mesh.clients": 1, "mesh.data": 1, "cohort_size": COHORT, "local_steps": 1, "post_steps": 1}
    fields |= {"batch_size": microbatch, "engine.microbatch": microbatch, "variants": ("tap",)}
    fields |= {"engine.host_gigabytes": 1e3, **(TINY if tiny else {})}
    config = load_config(path, fields)
    startup.start_jax(config)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(pathlib.Path(folder), config.model.vocab)
        config.unlock()
        run = experiment.build(override(config, {"data.tokenizer": folder}))
    state = run.init()
    run = dataclasses.replace(run, initial_blocks={})  # as `runs.run` does
    clients = len(run.federation.clients)
    peaks, before = [], 0
    for round_ in range(rounds or clients // COHORT):
        if round_ == 1:  # the first one compiles
            before = peak()
            # What the compiler has freed goes back to the system, or arrays would lie where it was, unseen.
            ctypes.CDLL(None).malloc_trim(0)
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        state, _ = run.round(state, range(COHORT * round_, COHORT * (round_ + 1)))
        jax.block_until_ready(state.server)
        peaks.append(peak())
        print(f"  round {round_ + 1}: {peaks[-1] / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    models = {id(leaf): leaf.nbytes for stored in state.client_models.values() for leaf in jax.tree.leaves(stored)}
    planned = plan(outline(config)).together(ROUND)
    held = array_bytes() + sum(models.values())
    return {"peaks": peaks, "before": before, "held": held, "planned": planned, "clients": clients}


def peak() -> int:
    """Bytes of this process in memory at most, since it was last reset."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def write_tokenizer(folder: pathlib.Path, size: int) -> None:
    """Word pieces as many as the model has: single characters, and others that no text has."""
    import string

    import tokenizers

    from tap_jax.data.text import SPECIAL, WordPiece

    characters = sorted(set(string.printable) - set(string.whitespace))
    pieces = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    pieces += [f"[unused{number}]" for number in range(size - len(pieces))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(list(SPECIAL))
    WordPiece(backend).save(folder)


if __name__ == "__main__":
    main()
