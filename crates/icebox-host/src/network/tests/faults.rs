//! A fault at every step: set-up unwinds, teardown tries everything, a kill -9 leaves nothing that cannot be found.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use icebox_engine::host::{Egress, Network as _, Removed};
use icebox_engine::id::Slot;
use rustix::process::{Signal, getpid, kill_process};

use super::super::NetworkSlots;
use super::super::error::Step;
use super::super::namespace::Namespace;
use super::super::slots::Hook;
use super::lab::{config, in_lab};

const SLOT: Slot = Slot(5);
/// More steps than any operation has.
const NEVER: usize = usize::MAX;

/// Counts the steps of an operation and fails at the one that is armed.
#[derive(Default)]
struct Fault {
    at: AtomicUsize,
    passed: AtomicUsize,
}

impl Fault {
    fn arm(&self, at: usize) {
        self.passed.store(0, Ordering::SeqCst);
        self.at.store(at, Ordering::SeqCst);
    }

    fn passed(&self) -> usize {
        self.passed.load(Ordering::SeqCst)
    }

    fn hook(self: &Arc<Self>) -> Hook {
        let fault = Arc::clone(self);
        Box::new(move |_| {
            let step = fault.passed.fetch_add(1, Ordering::SeqCst);
            if step == fault.at.load(Ordering::SeqCst) {
                return Err(io::Error::other("injected"));
            }
            Ok(())
        })
    }
}

#[test]
fn inv_48_set_up_that_fails_at_any_step_leaves_the_host_as_it_was() {
    in_lab(|lab| {
        let fault = Arc::new(Fault::default());
        fault.arm(NEVER);
        let network = lab.open_with(0, fault.hook());
        lab.run(async {
            // Forwarding stays on by intention, so it is on before we compare.
            network.ensure(SLOT, Egress::Internet).await.unwrap();
            let steps = fault.passed();
            network.release(SLOT).await.unwrap();
            assert!(steps > 10, "{steps}");
            let before = lab.inventory();
            for step in 0..steps {
                fault.arm(step);
                let error = network.ensure(SLOT, Egress::Internet).await.unwrap_err();
                assert_eq!(error.to_string(), "set up network slot 5", "step {step}");
                fault.arm(NEVER);
                assert_eq!(lab.inventory(), before, "step {step}");
                assert_eq!(network.list().await.unwrap(), [], "step {step}");
                network.ensure(SLOT, Egress::Internet).await.unwrap();
                network.release(SLOT).await.unwrap();
            }
            network.close().await.unwrap();
        });
    });
}

#[test]
fn a_slot_in_use_loses_nothing_when_checking_it_fails() {
    in_lab(|lab| {
        let fault = Arc::new(Fault::default());
        fault.arm(NEVER);
        let network = lab.open_with(0, fault.hook());
        lab.run(async {
            network.ensure(SLOT, Egress::Deny).await.unwrap();
            let in_use = lab.inventory();
            fault.arm(NEVER);
            network.ensure(SLOT, Egress::Deny).await.unwrap();
            for step in 0..fault.passed() {
                fault.arm(step);
                network.ensure(SLOT, Egress::Deny).await.unwrap_err();
                assert_eq!(lab.inventory(), in_use, "step {step}");
            }
            fault.arm(NEVER);
            network.release(SLOT).await.unwrap();
            network.close().await.unwrap();
        });
    });
}

#[test]
fn inv_48_teardown_tries_every_step_and_reports_all_that_failed() {
    in_lab(|lab| {
        let failing: Arc<std::sync::Mutex<Vec<Step>>> = Arc::default();
        let hook: Hook = {
            let failing = Arc::clone(&failing);
            Box::new(move |step| match step {
                Some(step) if failing.lock().unwrap().contains(&step) => {
                    Err(io::Error::other(format!("injected into {step:?}")))
                }
                _ => Ok(()),
            })
        };
        let network = lab.open_with(0, hook);
        let taking_down = [Step::DeleteLink, Step::Unpublish, Step::Unlink];
        lab.run(async {
            let before = lab.inventory();
            for step in taking_down {
                let slot = network.ensure(SLOT, Egress::Deny).await.unwrap();
                // The kernel removes the link by and by when nothing holds the namespace any more.
                let _held = Namespace::open(&slot.namespace).unwrap().unwrap();
                *failing.lock().unwrap() = vec![step];
                let error = network.release(SLOT).await.unwrap_err().to_string();
                assert!(
                    error.contains(&format!("injected into {step:?}")),
                    "{error}"
                );
                assert_eq!(network.list().await.unwrap(), [SLOT], "it is still known");
                failing.lock().unwrap().clear();
                assert_eq!(network.release(SLOT).await.unwrap(), Removed::Removed);
                assert_eq!(lab.inventory(), before, "{step:?}");
            }
            network.ensure(SLOT, Egress::Deny).await.unwrap();
            *failing.lock().unwrap() = taking_down.to_vec();
            let error = network.release(SLOT).await.unwrap_err().to_string();
            assert_eq!(error.matches("injected").count(), 3, "{error}");
            failing.lock().unwrap().clear();
            network.release(SLOT).await.unwrap();
            network.close().await.unwrap();
        });
    });
}

#[test]
fn inv_30_kill_9_at_any_step_of_set_up_leaves_nothing_that_release_does_not_find() {
    in_lab(|lab| {
        let survivor = lab.open(0);
        lab.run(survivor.ensure(SLOT, Egress::Internet)).unwrap();
        lab.run(survivor.release(SLOT)).unwrap();
        let before = lab.inventory();
        let mut steps = 0;
        loop {
            // A daemon of the same installation; it is in this lab because this thread is.
            let status = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "--ignored",
                    "network::tests::faults::daemon_that_dies",
                ])
                .env("ICEBOX_TEST_DIE_AT", steps.to_string())
                .env("ICEBOX_TEST_DIRECTORY", lab.directory())
                .stdout(std::process::Stdio::null())
                .status()
                .unwrap();
            if status.success() {
                break;
            }
            assert_eq!(status.signal(), Some(9), "step {steps}");
            // Whatever is there, a new daemon can go on from it as well as take it away.
            if steps % 2 == 0 {
                lab.run(survivor.ensure(SLOT, Egress::Internet)).unwrap();
            }
            lab.run(survivor.release(SLOT)).unwrap();
            assert_eq!(lab.run(survivor.list()).unwrap(), []);
            assert_eq!(lab.inventory(), before, "step {steps}");
            steps += 1;
        }
        assert!(steps > 10, "{steps}");
        lab.run(survivor.release(SLOT)).unwrap();
        lab.run(survivor.close()).unwrap();
    });
}

#[test]
#[ignore = "the daemon of the test above"]
fn daemon_that_dies() {
    let die_at: usize = std::env::var("ICEBOX_TEST_DIE_AT")
        .expect("run by the test above")
        .parse()
        .unwrap();
    let directory = std::env::var_os("ICEBOX_TEST_DIRECTORY").unwrap();
    let step = AtomicUsize::new(0);
    let hook: Hook = Box::new(move |_| {
        if step.fetch_add(1, Ordering::SeqCst) == die_at {
            kill_process(getpid(), Signal::KILL)?;
        }
        Ok(())
    });
    let network = NetworkSlots::open_with(&config(directory.as_ref(), 0), hook).unwrap();
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(network.ensure(SLOT, Egress::Internet))
        .unwrap();
}
