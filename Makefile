# make test    install into .venv, then run the tests
# make train   install into .venv, then a short distillation on two CPU ranks or on all GPUs
# make check   style
PYTHON ?= python3
BIN := .venv/bin
FD_DATA ?= ../shared/data

.PHONY: test train check

.venv: .venv/installed

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

test: .venv
	$(BIN)/python -m pytest $(ARGS)

check: .venv
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/ruff check fd_large tests benchmarks

# A small student of a random teacher: it shows the machinery, not the method.
train: .venv runs/pictures
	$(BIN)/deepspeed $$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else '--num_accelerators 2')") \
	  fd_large/train.py --deepspeed_config ds_configs/zero3.json --recipe fd_swinv2_base \
	  --data.root runs/pictures --data.image_size 96 --data.workers 1 \
	  --student.architecture.embed_dim 32 --student.architecture.depths 2 2 2 2 \
	  --student.architecture.num_heads 1 2 4 8 --student.architecture.window_size 6 \
	  --teacher.model swinv2_tiny --teacher.architecture.window_size 6 --teacher.source random \
	  --batch.global_batch_size 32 --optim.max_steps 24 --optim.warmup_epochs 1 \
	  --runtime.log_every 4 --runtime.run_dir runs/first $(ARGS)

runs/pictures:
	@test -f $(FD_DATA)/imagenet_sample256.tar || { echo "make train: no pictures; set FD_DATA, or give --data.root: make train ARGS='--data.root FOLDER'"; exit 2; }
	mkdir -p $@ && tar -xf $(FD_DATA)/imagenet_sample256.tar -C $@
