"""The process in which vLLM samples. It runs alone, under whichever interpreter has vLLM; nothing of prefopt is there.

Lines of JSON come in: first the arguments of `vllm.LLM`, then, time after time, `{"params": ..., "prompts": [ids],
"seeds": [...]}`. For each one line goes out: true, then the token ids of each answer, end marker included.
"""

import json
import os
import sys


def main() -> None:
    # Libraries print what they like to standard output; replies have a way of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    import vllm  # type: ignore[import-not-found,unused-ignore]

    model = vllm.LLM(**json.loads(sys.stdin.readline()))
    print(json.dumps(True), file=replies)
    for line in sys.stdin:
        asked = json.loads(line)
        params = [vllm.SamplingParams(**asked["params"], seed=seed) for seed in asked["seeds"]]
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        outputs = model.generate(prompts, params, use_tqdm=False)
        print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), file=replies)


if __name__ == "__main__":
    main()
