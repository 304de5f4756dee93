# guestapi. 'make demo' and 'make test' set up all that they need, Debian packages included; everything else is in
# docs/operations.md.

# Debian's own Python: one in somebody's home directory could not be run by the service's user.
PYTHON ?= /usr/bin/python3
VENV ?= .venv
PREFIX ?= /opt/guestapi
DESTDIR ?=
# How long 'make fuzz' takes.
SECONDS ?= 600

SYSTEMD_DIR = $(DESTDIR)/etc/systemd/system
CONF_DIR = $(DESTDIR)/etc/guestapi
STATE_DIR = $(DESTDIR)/var/lib/guestapi
UNITS = guestapi.service guestapi.socket guestapi-lxd.socket guestapi-mirror.service guestapi-mirror-lxd.service \
	guestapi-rebind@.service guestapi-takeover@.service
# What is switched off before it is taken away.
STARTED = $(filter-out %@.service,$(UNITS)) guestapi-takeover@incus.service guestapi-takeover@lxd.service
# What container runtimes and hosts with a daemon need; docs/lxc.md, podman.md, nspawn.md and incus.md say where to put it.
RUNTIME_FILES = conf/lxc-guestapi.conf conf/oci-guestapi.json systemd/nspawn-guestapi.conf systemd/incus-takeover.conf \
	systemd/incus-device.conf systemd/lxd-takeover.conf systemd/lxd-device.conf

# Tests mostly wait for other processes, so two modules of them run at a time; 'make test AT_ONCE=' runs one.
AT_ONCE ?= --numprocesses 2 --dist loadscope --no-loadscope-reorder

# What 'make mutate' is told: see tools/mutate.py.
MUTATE ?=


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
	@[ -d $(VENV)/cloud-init ] || tools/unpack-cloud-init $(VENV)/cloud-init
	$(VENV)/bin/pytest $(AT_ONCE)

test-fast: $(VENV)/ready $(VENV)/parsers ## the tests that need no service, container, daemon or machine, nor root (two minutes)
	$(VENV)/bin/pytest --fast $(AT_ONCE)

test-newest: $(VENV)/ready $(VENV)/parsers ## the same with the newest of everything that pyproject.toml allows, instead of what is locked
	PYTHON=$(PYTHON) tools/newest $(VENV)/newest
	$(VENV)/newest/bin/pytest --fast $(AT_ONCE)

test-debian13: ## test-fast and the demo in a root of Debian 13, with its Python and programs (as root)
	@tools/packages install root
	tools/debian_root.py run trixie --package $$(tools/packages list test) git --checkout -- make test-fast demo

fuzz: $(VENV)/ready ## coverage-guided fuzzing for SECONDS (600) in all
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	$(VENV)/bin/python -m tests.fuzz $(SECONDS)

mutate: $(VENV)/ready ## which faults in the core no test notices, of a sample (as root, an hour; MUTATE="--sample 60")
	@$(VENV)/bin/python tools/mutate.py $(MUTATE)

bench: $(VENV)/ready daemons ## measure it beside what it can be compared with (as root, nine minutes)
	@tools/packages install bench
	@$(VENV)/bin/python -m benchmarks

lint: $(VENV)/ready ## ruff and mypy --strict
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

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
	@for kind in incus lxd docker; do \
		[ -d $(VENV)/$$kind ] || tools/unpack-daemon $$kind $(VENV)/$$kind || \
			echo "$$kind cannot be had here; what needs it will say so" >&2; \
	done

update: $(VENV)/ready ## lock the newest versions that pyproject.toml allows into requirements/
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/lock.txt
	VENV=$(VENV) tools/lock --upgrade

install: ## put it into PREFIX (/opt/guestapi), with units, conf, user and state directory (DESTDIR respected)
	@if [ -z "$(DESTDIR)" ]; then tools/packages install install; fi
	PYTHON=$(PYTHON) tools/venv $(DESTDIR)$(PREFIX) run
	@if [ -n "$(DESTDIR)" ]; then \
		grep -rlIF '$(abspath $(DESTDIR))$(PREFIX)' $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/pyvenv.cfg \
			| xargs -r sed -i 's#$(abspath $(DESTDIR))$(PREFIX)#$(PREFIX)#g'; \
	fi
	install -d $(DESTDIR)/usr/local/bin $(SYSTEMD_DIR) $(CONF_DIR) $(DESTDIR)/usr/lib/sysusers.d
	ln -sfn $(PREFIX)/bin/guestapi $(DESTDIR)/usr/local/bin/guestapi
	for unit in $(UNITS); do \
		sed 's#/opt/guestapi#$(PREFIX)#g' systemd/$$unit >$(SYSTEMD_DIR)/$$unit && chmod 0644 $(SYSTEMD_DIR)/$$unit || exit 1; \
	done
	install -m 0644 systemd/guestapi.sysusers $(DESTDIR)/usr/lib/sysusers.d/guestapi.conf
	for file in guestapi.toml gunicorn.conf.py; do \
		if [ -e $(CONF_DIR)/$$file ]; then install -m 0644 conf/$$file $(CONF_DIR)/$$file.new; \
		else install -m 0644 conf/$$file $(CONF_DIR)/$$file; fi; \
	done
	for file in $(RUNTIME_FILES); do \
		sed 's#/opt/guestapi#$(PREFIX)#g' $$file >$(CONF_DIR)/$${file##*/} && chmod 0644 $(CONF_DIR)/$${file##*/} || exit 1; \
	done
	install -d -m 0770 $(STATE_DIR)
	@if [ -z "$(DESTDIR)" ]; then \
		systemd-sysusers guestapi.conf && chown guestapi:guestapi $(STATE_DIR) || exit 1; \
		if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi; \
		echo "installed; now: systemctl enable --now guestapi.socket"; \
	fi

uninstall: ## take it away again, but for its state
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then \
		systemctl disable --now $(STARTED) 2>/dev/null || true; \
	fi
	rm -rf $(DESTDIR)$(PREFIX)
	rm -f $(DESTDIR)/usr/local/bin/guestapi $(addprefix $(SYSTEMD_DIR)/,$(UNITS))
	rm -f $(DESTDIR)/usr/lib/sysusers.d/guestapi.conf
	rm -f $(CONF_DIR)/guestapi.toml $(CONF_DIR)/gunicorn.conf.py $(CONF_DIR)/guestapi.toml.new $(CONF_DIR)/gunicorn.conf.py.new \
		$(addprefix $(CONF_DIR)/,$(notdir $(RUNTIME_FILES)))
	@if [ -d $(CONF_DIR) ]; then rmdir --ignore-fail-on-non-empty $(CONF_DIR); fi
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
	@echo "the state stays in $(STATE_DIR), and the users guestapi, to whom it belongs, and guestapi-mirror"

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
