//! The project's own chores: `cargo xtask check`, `gen`, `agent`, `test-host`, `bench`, `soak`.
//!
//! One small dependency, so that it builds in a moment and works before anything else does.

mod bench;
mod check;
mod documents;
mod run;
mod soak;
mod test_host;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cargo xtask <chore>

  check     format, lints, and every test this machine can run; what it cannot is named at the end
  gen       write what documents say of the tests: docs/invariants.md
  agent     build the guest agent, static
  test-host the tests that need a kernel with device-mapper, ZFS and KVM, in a virtual Debian; --keep, --shell and more
  bench     measure, beside what QEMU alone takes; --quick, --json FILE and more
            bench volumes: each volume driver, beside the raw disk; --quick, --driver NAME, --directory DIR
            bench vmms: Cloud Hypervisor and Firecracker, beside what each takes alone; --vmm NAME, --rounds N and more
  soak      boots:  boot guests, several at a time, and check each one's devices; -n BOOTS -j AT_ONCE
            model:  random verbs under random faults, of seeds nobody has chosen; -n RUNS --steps STEPS --seed FIRST
            pairs:  kill -9 at every step on real sandboxes, with every volume driver
";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let chore = arguments.next();
    let rest: Vec<String> = arguments.collect();
    let done = match (chore.as_deref(), rest.as_slice()) {
        (Some("check"), []) => check::check(),
        (Some("gen"), []) => documents::generate(),
        (Some("agent"), []) => run::build_agent(),
        (Some("test-host"), options) => test_host::test_host(options),
        (Some("bench"), [first, options @ ..]) if first == "volumes" => bench::volumes(options),
        (Some("bench"), [first, options @ ..]) if first == "vmms" => bench::vmms(options),
        (Some("bench"), options) => bench::bench(options),
        (Some("soak"), options) => soak::soak(options),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask: {failure}");
            ExitCode::FAILURE
        }
    }
}
