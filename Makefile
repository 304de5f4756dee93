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
	guestapi-takeover@.service
# What is switched off before it is taken away.
STARTED = $(filter-out %@.service,$(UNITS)) guestapi-takeover@incus.service guestapi-takeover@lxd.service
# What container runtimes and hosts with a daemon need; docs/lxc.md, podman.md, nspawn.md and incus.md say where to put it.
RUNTIME_FILES = conf/lxc-guestapi.conf conf/oci-guestapi.json systemd/nspawn-guestapi.conf systemd/incus-takeover.conf \
	systemd/incus-device.conf systemd/lxd-takeover.conf systemd/lxd-device.conf

# To build systemd-python, and to run.
BUILD_PACKAGES = python3-venv python3-dev gcc pkg-config libsystemd-dev
# What the demo and the tests do, they do with the real thing.
DEMO_PACKAGES = $(BUILD_PACKAGES) curl systemd util-linux
# Its load generator is C.
BENCH_PACKAGES = $(DEMO_PACKAGES) libc6-dev lxc busybox-static uidmap
TEST_PACKAGES = $(DEMO_PACKAGES) dbus procps strace python3-requests python3-yaml python3-configobj python3-jinja2 \
	python3-oauthlib python3-jsonpatch python3-jsonschema lxc busybox-static podman crun \
	systemd-container uidmap

# Tests mostly wait for other processes, so two modules of them run at a time; 'make test AT_ONCE=' runs one.
AT_ONCE ?= --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: help bench demo test fuzz lint format install uninstall clean

help:
	@echo 'make demo        see it work: service, container, every endpoint'
	@echo 'make test        the whole test suite (as root)'
	@echo 'make fuzz        coverage-guided fuzzing for SECONDS (600) in all'
	@echo 'make bench       measure it beside what it can be compared with (as root, nine minutes)'
	@echo 'make lint        ruff and mypy --strict'
	@echo 'make install     put it into $(PREFIX), with units, conf, user and state directory (DESTDIR respected)'
	@echo 'make uninstall   take it away again, but for its state'

demo: $(VENV)/ready
	@$(call need,$(DEMO_PACKAGES))
	@$(VENV)/bin/python -m tests.demo

test: $(VENV)/ready
	@$(call need,$(TEST_PACKAGES))
	@[ -d $(VENV)/cloud-init ] || $(call unpack_cloud_init)
	@$(unpack_daemons)
	$(VENV)/bin/pytest $(AT_ONCE)

fuzz: $(VENV)/ready
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test,fuzz]'
	$(VENV)/bin/python -m tests.fuzz $(SECONDS)

bench: $(VENV)/ready
	@$(call need,$(BENCH_PACKAGES))
	@$(unpack_daemons)
	@$(VENV)/bin/python -m benchmarks

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

format: $(VENV)/ready
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

# Installs those of the given packages that are missing. Without root it says what to install.
define need
missing=; for package in $(1); do \
	dpkg-query -W -f '$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$package"; \
done; \
if [ -n "$$missing" ]; then \
	if [ "$$(id -u)" = 0 ]; then \
		echo "installing$$missing"; \
		(apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			$$missing >/dev/null) || exit 1; \
	else \
		echo "please install as root: apt-get install$$missing" >&2; exit 1; \
	fi; \
fi
endef

# Debian's cloud-init as it is, but unpacked beside the tests, not installed: it would configure this machine.
define unpack_cloud_init
(set -e; unpack=$$(mktemp -d); trap 'rm -rf "$$unpack"' EXIT; cd "$$unpack"; \
	apt-get -qq -o APT::Sandbox::User=root download cloud-init 2>/dev/null || { apt-get -qq update; \
	apt-get -qq -o APT::Sandbox::User=root download cloud-init; }; dpkg-deb -x cloud-init_*.deb unpacked; \
	mv unpacked $(abspath $(VENV))/cloud-init)
endef

# So are the daemons, beside which tests and benchmarks stand.
define unpack_daemons
for kind in incus lxd; do \
	[ -d $(VENV)/$$kind ] || tests/harness/unpack-daemon.sh $$kind $(abspath $(VENV))/$$kind || \
		echo "$$kind cannot be had here; what needs it will say so" >&2; \
done
endef

$(VENV)/ready: setup.py Makefile
	@$(call need,$(BUILD_PACKAGES))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[test,lint]'
	@touch $@

install:
	@if [ -z "$(DESTDIR)" ]; then $(call need,$(BUILD_PACKAGES)); fi
	@# setuptools would install what an earlier build has left there.
	rm -rf build
	$(PYTHON) -m venv $(DESTDIR)$(PREFIX)
	$(DESTDIR)$(PREFIX)/bin/pip install --quiet --disable-pip-version-check .
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

uninstall:
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
