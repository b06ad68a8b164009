# make       virtual environment, corpus, and the experiments
# make words the same set-up, and text in other words: observed in one, judged in another
# make test  the same set-up, and the tests
# make study-1   the runs behind the README's tables of stage 1; goes on where it was
# make study-1-long   the same for 20,000 self steps
# make study-2, study-2-meaning, study-3, study-3-shift, ...   the same of stages 2 and 3
PYTHON ?= python3
BIN := .venv/bin
STUDIES := study-1 study-1-long study-2 study-2-meaning study-2-words study-3 study-3-forms study-3-shift \
    study-3-chunks study-3-words study-3-facts study-3-ranks study-3-long

.PHONY: run words test $(STUDIES)
run: .venv/installed
	$(BIN)/python prepare_data.py
	$(BIN)/python self_ce.py
	$(BIN)/python gist_bottleneck.py
	$(BIN)/python meta_gist.py

words: .venv/installed
	$(BIN)/python meta_gist.py --dataset=kjv-asv --vocab=1024 --n_layer=1 --learning_rate=3e-3 --kappa=7 --chunk=1 \
	  --pretrain=1000 --meta_steps=2200 --val_chunks=aligned --outer_batch=16 --inner_steps=1 \
	  --inner_length=0.05 --scalar_rate=0.03 --self_steps=600 \
	  --eval_interval=50 --eval_windows=512 --arms=real,oracle,frozen,shuffled --out_dir=out/words
	$(BIN)/python studies/verses.py out/words

$(STUDIES): study-%: .venv/installed
	$(BIN)/python studies/study.py $*
	$(BIN)/python studies/report.py

test: .venv/installed-test
	$(BIN)/python -m pytest

# A mark is newer than the requirements it satisfies, so that nothing is installed twice.
.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-test: requirements-test.txt .venv/installed
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	touch $@
