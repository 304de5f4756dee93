# guestapi. 'make demo' and 'make test' set up all that they need, Debian packages included; everything else is in
# docs/operations.md.

# Debian's own Python: one in somebody's home directory could not be run by the service's user.
PYTHON ?= /usr/bin/python3
VENV ?= .venv
PREFIX ?= /opt/guestapi
DESTDIR ?=
# How long 'make fuzz' takes.
SECONDS ?= 600

# The releases of Debian for which 'make deb' builds packages.
DEB_SUITES ?= bookworm trixie

# Who distributes them.
DEBFULLNAME ?= The guestapi maintainers
DEBEMAIL ?= guestapi@localhost

# How many test processes run at a time, each with a module. Most of 'make test' waits for other processes.
# 'make test AT_ONCE=' runs one module after the other in one process.
PROCESSES ?= 2
test: PROCESSES = 6
AT_ONCE ?= --numprocesses $(PROCESSES) --dist loadscope --no-loadscope-reorder

# What 'make mutate' is told: see tools/mutate.py.
MUTATE ?=

# Bytecode is kept, whatever the environment says: tests start thousands of processes. 'make test' makes it beforehand,
# because the service, which is another user, could not keep it.
unexport PYTHONDONTWRITEBYTECODE

# The help of a target stands behind it.
.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1|/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r target does; do \
		printf 'make %-13s %s\n' "$$target" "$$does"; done

demo: $(VENV)/ready ## see it work: service, container, every endpoint
	@tools/packages install demo
	@$(VENV)/bin/python -m tests.demo

test: $(VENV)/ready $(VENV)/parsers daemons ## the whole test suite (as root)
	@tools/packages install test
	@[ -d $(VENV)/cloud-init ] || tools/unpack $(VENV)/cloud-init cloud-init
	@[ -d $(VENV)/openssh ] || tools/unpack $(VENV)/openssh openssh-server libwrap0 libnsl2
	@$(VENV)/bin/python -m compileall -q guestapi
	$(VENV)/bin/pytest $(AT_ONCE)

test-fast: $(VENV)/ready $(VENV)/parsers ## the tests that need no service, container, daemon or machine, nor root (two minutes)
	$(VENV)/bin/pytest --fast $(AT_ONCE)

test-newest: $(VENV)/ready $(VENV)/parsers ## the same with the newest of everything that pyproject.toml allows, instead of what is locked
	PYTHON=$(PYTHON) tools/newest $(VENV)/newest
	$(VENV)/newest/bin/pytest --fast $(AT_ONCE)

test-debian13: ## test-fast, the demo, and tests of podman and guestctl in a root of Debian 13, with its Python and programs (as root)
	@tools/packages install root
	tools/debian_root.py run trixie --package $$(tools/packages list debian) --checkout -- make test-fast demo test-podman test-guestctl

# podman alone, which differs most between the releases of Debian.
test-podman: $(VENV)/ready
	$(VENV)/bin/pytest tests/sources/test_engine_followers.py -k Podman

# guestctl, which instances run with whatever Python they have.
test-guestctl: $(VENV)/ready
	$(VENV)/bin/pytest tests/guest/test_guestctl.py

# The suite of Debian that is booted.
SUITE ?= trixie

systems: ## build the roots and the image that test-debian13 and test-machine build otherwise when they need them (as root)
	@tools/packages install machine packaging
	tools/debian_root.py build trixie --package $$(tools/packages list debian)
	$(PYTHON) -m tests.machine.image $(SUITE)

test-machine: $(VENV)/ready ## boot a virtual machine of SUITE (trixie, bookworm) and test on it (as root, half an hour)
	@tools/packages install machine
	GUESTAPI_MACHINE=$(SUITE) $(VENV)/bin/pytest tests/machine

# The release of Incus that makes the cluster, as tools/unpack-daemon names it.
GUESTAPI_CLUSTER ?= incus

test-cluster: $(VENV)/ready daemons ## three Incus daemons in a cluster, with a guestapi beside each (as root, four minutes; GUESTAPI_CLUSTER=incus-7)
	@tools/packages install test
	GUESTAPI_CLUSTER=$(GUESTAPI_CLUSTER) $(VENV)/bin/pytest tests/cluster

test-fleet: $(VENV)/ready ## a fleet on three PostgreSQL servers with ten hosts, and every fault; Patroni; two hosts with systemd (as root, five minutes)
	@tools/packages install test
	@[ -d $(VENV)/patroni ] || tools/unpack $(VENV)/patroni patroni etcd-server python3-etcd python3-psycopg2 \
		python3-prettytable python3-psutil python3-dateutil python3-six python3-dnspython python3-click python3-cdiff \
		python3-wcwidth
	GUESTAPI_FLEET=1 $(VENV)/bin/pytest tests/fleet_faults

fuzz: $(VENV)/ready ## coverage-guided fuzzing for SECONDS (600) in all
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	$(VENV)/bin/python -m tests.fuzz $(SECONDS)

mutate: $(VENV)/ready ## which faults in the core no test notices, of a sample (as root, an hour; MUTATE="--sample 60")
	@$(VENV)/bin/python tools/mutate.py $(MUTATE)

bench: $(VENV)/ready daemons ## measure it beside what it can be compared with (as root, sixteen minutes; make bench hostile: attacks alone; make bench fleet: a fleet alone)
	@tools/packages install bench
	@$(VENV)/bin/python -m benchmarks $(filter hostile fleet,$(MAKECMDGOALS))

# 'make bench hostile': the attacks alone; 'make bench fleet': a fleet of 1,000 hosts alone.
hostile: bench
fleet: bench

lint: $(VENV)/ready ## ruff and mypy --strict
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

docs: $(VENV)/ready ## write docs/commands.md and docs/modules.md, which are made of the code
	$(VENV)/bin/python tools/reference.py

format: $(VENV)/ready
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# What tests and lint need together: mypy reads the tests.
$(VENV)/ready: pyproject.toml tools/venv tools/packages $(addprefix requirements/,build.txt run.txt test.txt lint.txt)
	@tools/packages install build
	PYTHON=$(PYTHON) tools/venv $(VENV) run test lint
	@touch $@

# A second version of the parser of requests, which tests run with too.
$(VENV)/parsers: $(VENV)/ready tools/parsers
	VENV=$(VENV) tools/parsers $@

# Beside which tests and benchmarks stand.
daemons: $(VENV)/ready
	@for kind in incus incus-7 lxd docker libvirt; do \
		[ -d $(VENV)/$$kind ] || tools/unpack-daemon $$kind $(VENV)/$$kind || \
			echo "$$kind cannot be had here; what needs it will say so" >&2; \
	done

lock: $(VENV)/ready ## lock into requirements/ what is new in pyproject.toml; other versions stay
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock.txt
	VENV=$(VENV) tools/lock $(LOCK)

update: ## lock the newest versions that pyproject.toml allows into requirements/
	$(MAKE) lock LOCK=--upgrade

install: ## put it into PREFIX (/opt/guestapi), with units, conf, user and state directory (DESTDIR respected)
	@$(PYTHON) tools/installation.py may-install --destdir '$(DESTDIR)'
	@if [ -z "$(DESTDIR)" ]; then tools/packages install install; fi
	PYTHON=$(PYTHON) tools/venv $(DESTDIR)$(PREFIX) run
	rm -rf build/manuals
	$(DESTDIR)$(PREFIX)/bin/python tools/manual.py build/manuals
	@if [ -n "$(DESTDIR)" ]; then \
		grep -rlIF '$(abspath $(DESTDIR))$(PREFIX)' $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/pyvenv.cfg \
			| xargs -r sed -i 's#$(abspath $(DESTDIR))$(PREFIX)#$(PREFIX)#g'; \
	fi
	$(PYTHON) tools/installation.py install --destdir '$(DESTDIR)' --prefix '$(PREFIX)' --manuals build/manuals

client: $(VENV)/ready ## guestapi.client as a wheel for instances, into dist/
	$(VENV)/bin/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist ./client

release-check: $(VENV)/ready ## whether tag, version, changelog and manual pages agree
	@$(VENV)/bin/python tools/release_check.py

deb: ## the Debian packages of this version, for each of DEB_SUITES, into dist/ (as root)
	@tools/packages install packaging
	@mkdir -p dist
	@for suite in $(DEB_SUITES); do \
		tools/debian_root.py run $$suite --package $$(tools/packages list debian) --checkout --bind dist:/srv/dist -- \
			env DEBFULLNAME="$(DEBFULLNAME)" DEBEMAIL="$(DEBEMAIL)" tools/build_deb.py /srv/dist | tail -n 1 | sed 's#^/srv/##' >dist/.built && cat dist/.built || exit 1; \
		lintian --allow-root --fail-on error "$$(cat dist/.built)" || exit 1; \
	done; rm -f dist/.built

uninstall: ## take it away again, but for its state and what was edited
	@$(PYTHON) tools/installation.py uninstall --destdir '$(DESTDIR)' --prefix '$(PREFIX)'

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
