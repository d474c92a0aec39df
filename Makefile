PYTHON ?= python3
PY = .venv/bin/python

.PHONY: setup demo test test-versions test-oldest test-newest base reca edit bench bench-gpu rounds
# one at a time: two suites would wait for each other's cores
.NOTPARALLEL:
setup: .venv/.done

.venv/.done: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(PY) data/shapes/demo.py

# a thread each: more of them than cores wait for each other
SUITE = -m pytest -q -n 2 --dist=loadfile tests
test test-oldest test-newest: export OMP_NUM_THREADS = 1
test test-oldest test-newest: export OMP_WAIT_POLICY = passive
test: setup
	$(PY) $(SUITE)

# the suite in the oldest environment of requirements.txt, then in the newest that there is;
# where the wheels come from is pip's own: make test-versions PIP_INDEX_URL=...
test-versions: test-oldest test-newest
test-oldest: VERSIONS = s/>=([^,]*),.*/==\1/
test-newest: VERSIONS = s/>=.*//
test-oldest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	sed -E '$(VERSIONS)' requirements.txt > .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check \
	    -r .venv-$*/requirements.txt
	.venv-$*/bin/python $(SUITE)

base: setup
	$(PY) data/shapes/pretrain.py

# what reconstruction alignment gains, from a base whose images are words
reca: setup
	$(PY) data/shapes/shared.py $(ARGS)

edit: setup
	$(PY) data/shapes/edits.py $(ARGS)

bench: demo
	$(PY) eval_t2i.py --init_from=base,out/demo/cold_start,out/demo/grpo_encoder,\
	out/demo/nft_decoder,out/demo/by_gradient

# published sizes, random weights, no recomputation: SD3.5-medium, then -large, with Qwen2.5-VL-3B;
# sized for a card of 80 GB (others: ARGS="--micro_batch=1")
FULL = bench/speed.py --random=True --steps=5 --checkpointing=False --guidance=1.0
COLD_START = --stage=cold_start --batch=4 --micro_batch=1
GRPO_ENCODER = --stage=grpo_encoder --batch=8 --group=4 --micro_batch=8
GRPO_DECODER = --stage=grpo_decoder --batch=4 --group=8 --micro_batch=4 --noisy_steps=3 \
    --trained_steps=1
OF_MEDIUM = --preset=medium --json=out/bench/medium
OF_LARGE = --preset=paper --json=out/bench/paper
bench-gpu: setup
	$(PY) $(FULL) $(OF_MEDIUM)-cold_start.json $(COLD_START) $(ARGS)
	$(PY) $(FULL) $(OF_MEDIUM)-grpo_encoder.json $(GRPO_ENCODER) $(ARGS)
	$(PY) $(FULL) $(OF_MEDIUM)-grpo_decoder.json $(GRPO_DECODER) $(ARGS)
	$(PY) $(FULL) $(OF_LARGE)-cold_start.json $(COLD_START) $(ARGS)
	$(PY) $(FULL) $(OF_LARGE)-grpo_encoder.json $(GRPO_ENCODER) $(ARGS)
	$(PY) $(FULL) $(OF_LARGE)-grpo_decoder.json $(GRPO_DECODER) $(ARGS)

# stages 2 and 3 in turn, R rounds, an evaluation after each:
# make rounds R=2 FROM=out/cold_start ARGS="--preset=paper --data=/data/photos"
R ?= 2
OUT ?= out/rounds
rounds: setup
	@last=$(FROM); \
	for r in $$(seq 1 $(R)); do \
	    $(PY) grpo_encoder.py --init_from=$$last --out_dir=$(OUT)/encoder_$$r \
	        --seed=$$r --resume $(ARGS) && \
	    $(PY) grpo_decoder.py --init_from=$(OUT)/encoder_$$r --out_dir=$(OUT)/decoder_$$r \
	        --seed=$$r --resume $(ARGS) && \
	    $(PY) eval_unified.py --init_from=$(OUT)/decoder_$$r --out_dir=$(OUT)/eval_$$r \
	        $(ARGS) || exit 1; \
	    last=$(OUT)/decoder_$$r; \
	done
