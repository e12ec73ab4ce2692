//! The life of slots: idempotence, exhaustion, neighbours on the same host, the pool.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use icebox_engine::host::{Egress, ErrorKind, HostError, Network as _, Removed, SlotNetwork};
use icebox_engine::id::Slot;
use rustix::mount::{UnmountFlags, mount_bind_recursive, unmount};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;

use super::super::error::{NetworkError, Step};
use super::super::namespace::Namespace;
use super::super::netlink::Netlink;
use super::super::slots::Hook;
use super::super::{NetworkConfig, NetworkSlots, open_tap};
use super::lab::in_lab;
use crate::instance::Instance;

#[test]
fn ensure_and_release_say_what_changed_and_repeat_harmlessly() {
    in_lab(|lab| {
        let network = lab.open(0);
        lab.run(async {
            assert_eq!(
                network.release(Slot(7)).await.unwrap(),
                Removed::AlreadyAbsent
            );
            let first = network.ensure(Slot(7), Egress::Deny).await.unwrap();
            let inventory = lab.inventory();
            assert_eq!(network.ensure(Slot(7), Egress::Deny).await.unwrap(), first);
            assert_eq!(
                lab.inventory(),
                inventory,
                "the second time changed something"
            );
            assert_eq!(first.host_address, network.host_address(Slot(7)));
            assert_eq!(network.list().await.unwrap(), [Slot(7)]);
            assert_eq!(network.release(Slot(7)).await.unwrap(), Removed::Removed);
            assert_eq!(
                network.release(Slot(7)).await.unwrap(),
                Removed::AlreadyAbsent
            );
            assert_eq!(network.list().await.unwrap(), []);
            network.close().await.unwrap();
        });
    });
}

#[test]
fn inv_17_a_slot_that_is_set_up_again_has_the_same_addresses() {
    in_lab(|lab| {
        let network = lab.open(2);
        lab.run(async {
            let first = network.ensure(Slot(9), Egress::Internet).await.unwrap();
            for _ in 0..5 {
                network.release(Slot(9)).await.unwrap();
                let again = network.ensure(Slot(9), Egress::Internet).await.unwrap();
                assert_eq!(again, first);
            }
            network.release(Slot(9)).await.unwrap();
            network.close().await.unwrap();
        });
    });
}

#[test]
fn a_slot_survives_the_daemon_and_is_found_again() {
    in_lab(|lab| {
        let network = lab.open(1);
        let slot = lab.run(network.ensure(Slot(1), Egress::Internet)).unwrap();
        let tap = open_tap(&slot.namespace, &slot.tap).unwrap();
        drop(network);
        let restarted = lab.open(1);
        lab.run(async {
            assert_eq!(restarted.list().await.unwrap(), [Slot(1)]);
            let found = restarted.ensure(Slot(1), Egress::Internet).await.unwrap();
            assert_eq!(found, slot);
            // Still the namespace that the first daemon made: its tap is in use.
            let error = open_tap(&found.namespace, &found.tap).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Busy);
            drop(tap);
            open_when_free(&found);
            restarted.release(Slot(1)).await.unwrap();
            restarted.close().await.unwrap();
        });
    });
}

/// What the first `ip netns add` on a machine does to the directory of all namespaces.
#[test]
fn inv_48_a_slot_goes_when_its_directory_was_mounted_over() {
    in_lab(|lab| {
        let network = lab.open(0);
        lab.run(async {
            network.ensure(Slot(4), Egress::Deny).await.unwrap();
            mount_bind_recursive(lab.directory(), lab.directory()).unwrap();
            network.ensure(Slot(5), Egress::Deny).await.unwrap();
            let released = [
                network.release(Slot(4)).await,
                network.release(Slot(5)).await,
            ];
            unmount(lab.directory(), UnmountFlags::DETACH).unwrap();
            for removed in released {
                assert_eq!(removed.unwrap(), Removed::Removed);
            }
            assert_eq!(network.list().await.unwrap(), []);
            network.close().await.unwrap();
        });
    });
}

/// Opens the tap; tries again while a process that another thread is starting still has a copy of its last descriptor.
fn open_when_free(slot: &SlotNetwork) {
    let start = Instant::now();
    while let Err(error) = open_tap(&slot.namespace, &slot.tap) {
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(start.elapsed() < Duration::from_secs(5), "still busy");
        std::thread::yield_now();
    }
}

#[test]
fn a_damaged_slot_is_completed_without_a_new_namespace() {
    in_lab(|lab| {
        let network = lab.open(0);
        lab.run(async {
            let slot = network.ensure(Slot(3), Egress::Internet).await.unwrap();
            let whole = lab.inventory();
            // Somebody deletes the link while a VMM holds the tap.
            let tap = open_tap(&slot.namespace, &slot.tap).unwrap();
            let name = network.slots.naming().name(Slot(3));
            Netlink::open().unwrap().delete_link(&name).unwrap();
            network.ensure(Slot(3), Egress::Internet).await.unwrap();
            assert_eq!(lab.inventory(), whole);
            open_tap(&slot.namespace, &slot.tap).expect_err("the tap is still the one in use");
            drop(tap);
            network.release(Slot(3)).await.unwrap();
            network.close().await.unwrap();
        });
    });
}

#[test]
fn inv_47_slots_run_out_with_an_error_that_says_so() {
    in_lab(|lab| {
        let config = NetworkConfig {
            prefix: "10.213.0.0/30".parse().unwrap(),
            ..lab.config(0)
        };
        lab.run(async {
            let network = NetworkSlots::open(config).await.unwrap();
            assert_eq!(network.capacity(), 2);
            for slot in 0..2 {
                network.ensure(Slot(slot), Egress::Deny).await.unwrap();
            }
            let before = lab.inventory();
            let error = network.ensure(Slot(2), Egress::Deny).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Exhausted);
            assert_eq!(
                error.to_string(),
                "network slot 2 does not exist: 10.213.0.0/30 has room for 2 slots"
            );
            assert!(error.hint_text().unwrap().contains("network.prefix"));
            assert_eq!(lab.inventory(), before);
            for slot in 0..2 {
                network.release(Slot(slot)).await.unwrap();
            }
            network.close().await.unwrap();
        });
    });
}

#[test]
fn inv_48_two_installations_on_one_host_do_not_touch_each_other() {
    in_lab(|lab| {
        let mine = lab.open(0);
        let other_config = NetworkConfig {
            instance: Instance::of_data_directory(Path::new("/srv/other")),
            prefix: "10.214.0.0/16".parse().unwrap(),
            ..lab.config(0)
        };
        lab.run(async {
            let other = NetworkSlots::open(other_config).await.unwrap();
            let a = mine.ensure(Slot(0), Egress::Deny).await.unwrap();
            let b = other.ensure(Slot(0), Egress::Deny).await.unwrap();
            assert_ne!(a.namespace, b.namespace);
            assert_ne!(a.host_address, b.host_address);
            assert_eq!(mine.list().await.unwrap(), [Slot(0)]);
            mine.release(Slot(0)).await.unwrap();
            mine.close().await.unwrap();
            assert_eq!(other.list().await.unwrap(), [Slot(0)]);
            assert!(Namespace::open(&b.namespace).unwrap().is_some());
            other.release(Slot(0)).await.unwrap();
            other.close().await.unwrap();
        });
    });
}

#[test]
fn inv_48_an_address_in_use_is_refused_and_left_alone() {
    in_lab(|lab| {
        let mine = lab.open(0);
        let other_config = NetworkConfig {
            instance: Instance::of_data_directory(Path::new("/srv/other")),
            ..lab.config(0)
        };
        lab.run(async {
            // Opened before either has a slot, so neither can know of the other yet.
            let other = NetworkSlots::open(other_config.clone()).await.unwrap();
            mine.ensure(Slot(0), Egress::Deny).await.unwrap();
            let before = lab.inventory();
            let error = other.ensure(Slot(0), Egress::Deny).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists);
            assert!(error.hint_text().unwrap().contains("network.prefix"));
            assert_eq!(lab.inventory(), before);
            other.close().await.unwrap();
            // One that starts later sees it at once.
            let Err(error) = NetworkSlots::open(other_config).await else {
                panic!("an overlapping prefix was accepted");
            };
            assert_eq!(error.kind(), ErrorKind::AlreadyExists);
            assert!(
                error.to_string().contains("overlaps with 10.213.0.1/32"),
                "{error}"
            );
            mine.release(Slot(0)).await.unwrap();
            mine.close().await.unwrap();
        });
    });
}

#[test]
fn many_slots_at_once() {
    in_lab(|lab| {
        let network = Arc::new(lab.open(4));
        lab.run(async {
            network.prepare(&[Slot(0); 24]);
            for _ in 0..2 {
                let tasks: Vec<_> = (0..24)
                    .map(|slot| {
                        let network = Arc::clone(&network);
                        tokio::spawn(async move {
                            network.ensure(Slot(slot), Egress::Deny).await?;
                            network.ensure(Slot(slot), Egress::Internet).await
                        })
                    })
                    .collect();
                let mut addresses = std::collections::HashSet::<Ipv4Addr>::new();
                for task in tasks {
                    assert!(addresses.insert(task.await.unwrap().unwrap().host_address));
                }
                assert_eq!(network.list().await.unwrap().len(), 24);
                let tasks: Vec<_> = (0..24)
                    .map(|slot| {
                        let network = Arc::clone(&network);
                        tokio::spawn(async move { network.release(Slot(slot)).await })
                    })
                    .collect();
                for task in tasks {
                    assert_eq!(task.await.unwrap().unwrap(), Removed::Removed);
                }
                assert_eq!(network.list().await.unwrap(), []);
            }
            let Ok(network) = Arc::try_unwrap(network) else {
                panic!("a task still holds the network");
            };
            network.close().await.unwrap();
        });
    });
}

#[test]
fn the_probe_proves_and_leaves_nothing() {
    in_lab(|lab| {
        let network = lab.open(0);
        let before = lab.inventory();
        lab.run(network.probe()).unwrap();
        assert_eq!(lab.inventory(), before);
        lab.run(network.close()).unwrap();
    });
}

#[test]
fn the_stock_is_kept_and_grows_for_what_is_announced() {
    in_lab(|lab| {
        let network = lab.open(2);
        network.pool.wait_until_stocked();
        assert_eq!(network.pool.stock(), 2);
        network.prepare(&[Slot(0), Slot(1), Slot(2), Slot(3), Slot(4)]);
        network.pool.wait_until_stocked();
        assert_eq!(network.pool.stock(), 5);
        lab.run(async {
            for slot in 0..5 {
                network.ensure(Slot(slot), Egress::Deny).await.unwrap();
            }
            network.pool.wait_until_stocked();
            assert_eq!(network.pool.stock(), 2);
            assert_eq!(
                network.list().await.unwrap().len(),
                5,
                "the stock is not listed"
            );
            for slot in 0..5 {
                network.release(Slot(slot)).await.unwrap();
            }
            network.close().await.unwrap();
        });
    });
}

#[test]
fn a_stock_that_cannot_be_filled_is_not_tried_in_a_loop() {
    in_lab(|lab| {
        let attempts = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&attempts);
        let hook: Hook = Box::new(move |step| match step {
            Some(Step::Tap) => {
                counted.fetch_add(1, Ordering::SeqCst);
                Err(std::io::Error::other("no tap today"))
            }
            _ => Ok(()),
        });
        let network = lab.open_with(4, hook);
        network.pool.wait_until_stocked();
        assert_eq!(attempts.load(Ordering::SeqCst), 1);
        let error = lab
            .run(network.ensure(Slot(0), Egress::Deny))
            .expect_err("made without a tap");
        assert_eq!(error.to_string(), "set up network slot 0");
        network.pool.wait_until_stocked();
        // One for the slot itself, one for the stock after it.
        assert_eq!(attempts.load(Ordering::SeqCst), 3);
        lab.run(network.close()).unwrap();
    });
}

#[test]
fn without_rights_the_error_says_which() {
    in_lab(|lab| {
        let network = lab.open(0);
        let config = lab.config(0);
        std::thread::scope(|scope| {
            let unprivileged = scope.spawn(|| {
                let nobody = Uid::from_raw(65534);
                set_thread_res_uid(nobody, nobody, nobody).unwrap();
                let opened = NetworkSlots::open_with(&config, Box::new(|_| Ok(()))).map(drop);
                let prepared = network.slots.prepare().map(drop);
                [
                    HostError::from(opened.unwrap_err()),
                    HostError::from(NetworkError::Prepare(prepared.unwrap_err())),
                ]
            });
            for error in unprivileged.join().unwrap() {
                assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
                assert!(error.hint_text().unwrap().contains("as root"), "{error:?}");
            }
        });
        lab.run(network.close()).unwrap();
    });
}

#[test]
#[ignore = "measures: run it alone, with --nocapture"]
fn how_long_slots_take() {
    in_lab(|lab| {
        let network = lab.open(4);
        lab.run(async {
            let (mut spare, mut stocked, mut again, mut release) = (vec![], vec![], vec![], vec![]);
            let mut unstocked = vec![];
            for _ in 0..50 {
                let start = Instant::now();
                let made = network.slots.prepare().unwrap();
                spare.push(start.elapsed());
                drop(made);
                network.pool.wait_until_stocked();
                let start = Instant::now();
                network.ensure(Slot(0), Egress::Internet).await.unwrap();
                stocked.push(start.elapsed());
                let start = Instant::now();
                network.ensure(Slot(0), Egress::Internet).await.unwrap();
                again.push(start.elapsed());
                network.pool.wait_until_stocked();
                let start = Instant::now();
                network.release(Slot(0)).await.unwrap();
                release.push(start.elapsed());
            }
            let without_stock = lab.open(0);
            for _ in 0..50 {
                let start = Instant::now();
                without_stock
                    .ensure(Slot(0), Egress::Internet)
                    .await
                    .unwrap();
                unstocked.push(start.elapsed());
                without_stock.release(Slot(0)).await.unwrap();
            }
            for (what, mut times) in [
                ("make a spare", spare),
                ("ensure from stock", stocked),
                ("ensure without stock", unstocked),
                ("ensure again", again),
                ("release", release),
            ] {
                times.sort();
                println!(
                    "{what}: median {:?}, p90 {:?}, max {:?}",
                    times[25], times[45], times[49]
                );
            }
            network.close().await.unwrap();
        });
    });
}
