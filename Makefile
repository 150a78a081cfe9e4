# Every target prepares what it needs by itself: .venv, and Debian's packages when run as root.
# PYTHON=… names the interpreter .venv is made with (3.11 or newer).

.DEFAULT_GOAL := help
.PHONY: help demo test check fuzz day sanitize chaos reliability bench docs install uninstall fmt clean venv tools lint types

PY := .venv/bin/python
SECONDS := 60
ROUNDS := 5
SECTION := all

# command=package that brings it: what flanneld_py.lab and the tests run
TOOLS := etcd=etcd-server etcdctl=etcd-client ip=iproute2 bridge=iproute2 ping=iputils-ping fping=fping nft=nftables
TOOLS += iperf3=iperf3 tcpdump=tcpdump strace=strace ethtool=ethtool sysctl=procps
TOOLS += unshare=util-linux nsenter=util-linux setpriv=util-linux prlimit=util-linux stdbuf=coreutils
TOOLS += openssl=openssl chattr=e2fsprogs iptables=iptables
TOOLS += shellcheck=shellcheck busybox=busybox-static
TOOLS += systemd-nspawn=systemd-container systemd-analyze=systemd debootstrap=debootstrap
TOOLS += /usr/lib/cni/bridge=containernetworking-plugins podman=podman crun=crun conmon=conmon
TOOLS += dnsmasq=dnsmasq-base docker-registry=docker-registry
# for the udp data plane in C; the second one brings Python's and the C library's headers
TOOLS += cc=gcc python3-config=python3-dev
# libFuzzer comes with another compiler, which only `make test` and `make fuzz` need
FUZZERS := clang=clang clang=libclang-rt-dev clang=libc6-dev

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: tools venv ## Hosts in network namespaces, with an etcd: watch them connect, break, and heal (root)
	@$(PY) -m flanneld_py.lab demo

test: TOOLS += $(FUZZERS)
test: tools lint types fuzz ## Linters, types, two minutes of fuzzing, and every test, with real etcd and kernel (root)
	@echo "==> all tests"
	@.ci/tests $(PY)

check: lint types ## Linters, types, unit tests: a few minutes, without root
	@echo "==> unit tests"
	@$(PY) -m pytest -q tests/unit

fuzz: TOOLS := $(FUZZERS)
fuzz: RUNS := 0
fuzz: TARGETS := packet turn
fuzz: tools venv ## Broken packets and one sort of broken input, SECONDS=60 each; TARGET=name or all, RUNS=1000000
	@for target in $(or $(TARGET),$(TARGETS)); do \
		.ci/phase "fuzz $$target" .ci/fuzz $$target "$(if $(filter-out 0,$(RUNS)),0,$(SECONDS))" "$(RUNS)" || exit; done

day: tools venv ## A day of peers and troubles in six minutes: what a daemon takes must not grow (root)
	@$(PY) -m pytest tests/netns/test_day.py --full --timeout=1200

sanitize: tools venv ## Only the tests of the udp data plane in C, most of them under sanitizers (root)
	@$(PY) -m pytest $(wildcard tests/unit/test_udp_*.py) tests/netns/test_udp_sanitized.py

chaos: tools venv ## Random faults over 5 hosts and 3 etcds: SEED=n SECONDS=60; SEEDS=50 in turn; MUTANTS=1 (root)
	@$(PY) -m tests.chaos $(if $(MUTANTS),--mutants,--seconds=$(SECONDS) $(if $(SEED),--seed=$(SEED)) \
		$(if $(SEEDS),--seeds=$(SEEDS) --quiet))

ROWS := build/reliability/rows.jsonl
reliability: tools venv ## Every fault on every backend; the table of docs/reliability.md is made anew (root, an hour)
	@rm -f $(ROWS)
	@$(PY) -m pytest -m fault --full --rows=$(ROWS) --reruns=1 --no-skips; code=$$?; \
		$(PY) -m tests.netns.faults.table $(ROWS) docs/reliability.md && exit $$code

bench: SECONDS := 2
bench: tools venv ## What it costs: SECTION=paths|scale|all ROUNDS=5 SECONDS=2 JSON=file, BENCH_PEER=a flanneld (root)
	@case "$(SECTION)" in paths | scale | all) ;; \
		*) echo "SECTION is '$(SECTION)', expected paths, scale or all" >&2; exit 2 ;; esac
	@$(PY) -m flanneld_py.lab bench --section=$(SECTION) --rounds=$(ROUNDS) --seconds=$(SECONDS) \
		--peer="$(BENCH_PEER)" --json="$(JSON)"

docs: venv ## Write docs/configuration.md anew from the code's tables
	@$(PY) -m flanneld_py.cli.reference > docs/configuration.md

install: ## Put it into place: PREFIX=/usr/local CNIBINDIR=/opt/cni/bin DESTDIR= PYTHON=/usr/bin/python3
	@.ci/install install

uninstall: ## Remove what `make install` put there, given the same variables; changed settings stay
	@.ci/install uninstall

fmt: venv ## Format the code and mend what the linter can mend
	@$(PY) -m ruff check --fix --exit-zero
	@$(PY) -m ruff format

clean: ## Remove .venv, caches, and build leftovers
	rm -rf .venv build dist *.egg-info flanneld_py/udp/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@.ci/prepare venv

tools:
	@.ci/prepare tools $(TOOLS)

lint: venv
	@.ci/phase "ruff" $(PY) -m ruff check
	@.ci/phase "ruff format" $(PY) -m ruff format --check

types: venv
	@.ci/phase "mypy" $(PY) -m mypy
