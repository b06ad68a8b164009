# make       virtual environment, corpus, and the experiments
# make test  the same set-up, and the tests
# make study-1   the runs behind the README's tables of stage 1; goes on where it was
# make study-1-long   the same for 20,000 self steps
# make study-2, study-3   the same of stages 2 and 3
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test study-1 study-1-long study-2 study-3
run: .venv/installed
	$(BIN)/python prepare_data.py
	$(BIN)/python self_ce.py
	$(BIN)/python gist_bottleneck.py
	$(BIN)/python meta_gist.py

study-1: .venv/installed
	$(BIN)/python study.py 1
	$(BIN)/python study_report.py

study-2: .venv/installed
	$(BIN)/python study.py 2
	$(BIN)/python study_report.py

study-3: .venv/installed
	$(BIN)/python study.py 3
	$(BIN)/python study_report.py

study-1-long: .venv/installed
	$(BIN)/python study.py 1-long
	$(BIN)/python study_report.py

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
