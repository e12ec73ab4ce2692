//! Lanes: sites that work at the same time. Tests of one take turns, and so do lanes where there are more of them than a
//! machine can carry.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::sdk;
use crate::site::{Driver, Site, patience};

/// Longer than any test takes. One that runs into it hangs, and nobody else would say which.
const LONGEST: Duration = Duration::from_mins(30);

/// A site that tests share, started by the first that needs it. Whoever waits with the lowest number is next, so that tests
/// run in their order however many wait at once.
pub(crate) struct Lane {
    start: fn() -> Site,
    queue: Mutex<Queue>,
    freed: Condvar,
    site: Mutex<Option<Site>>,
}

#[derive(Default)]
struct Queue {
    busy: bool,
    waiting: BTreeSet<usize>,
}

/// A lane for each driver, one for other people's programs, and a second one for the driver that most tests run with.
static LANES: [Lane; Driver::ALL.len() + 2] = [
    Lane::new(|| Site::with_templates(Driver::DmSnapshot)),
    Lane::new(|| Site::with_templates(Driver::Zfs)),
    Lane::new(|| Site::with_templates(Driver::Reflink)),
    Lane::new(|| Site::with_templates(Driver::Qcow2)),
    Lane::new(sdk::site),
    Lane::new(|| Site::with_templates(Driver::Qcow2)),
];

/// How many lanes work at a time. Guests wait for their deadlines for much of it, so two processors carry three.
const AT_ONCE: usize = 3;
/// How many do.
static WORKING: Mutex<usize> = Mutex::new(0);
static RESTED: Condvar = Condvar::new();

/// The lane of a driver's tests.
pub(crate) fn of_driver(driver: Driver) -> &'static Lane {
    &LANES[driver as usize]
}

/// The lane of tests of other people's programs.
pub(crate) fn of_programs() -> &'static Lane {
    &LANES[Driver::ALL.len()]
}

/// The lane of a driver's long tests.
pub(crate) fn of_long_tests(driver: Driver) -> &'static Lane {
    match driver {
        Driver::Qcow2 => &LANES[Driver::ALL.len() + 1],
        other => of_driver(other),
    }
}

/// Ends every lane's site. Unless a test failed, nothing may be left of it on the host.
pub(crate) fn finish(failed: bool) {
    for lane in &LANES {
        let site = locked(&lane.site).take();
        // A failed test's site is only removed: what is left there is told already.
        let finish = if failed { drop } else { Site::finish };
        site.into_iter().for_each(finish);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends this process if `work` does not end.
#[expect(clippy::exit, reason = "a thread that hangs cannot be ended alone")]
fn watched<T>(name: &str, work: impl FnOnce() -> T) -> T {
    let (ended, end) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if end.recv_timeout(patience(LONGEST)) == Err(RecvTimeoutError::Timeout) {
                eprintln!("{name} hangs: FAILED");
                std::process::exit(101);
            }
        });
        let done = work();
        drop(ended);
        done
    })
}

impl Lane {
    const fn new(start: fn() -> Site) -> Self {
        Self {
            start,
            queue: Mutex::new(Queue {
                busy: false,
                waiting: BTreeSet::new(),
            }),
            freed: Condvar::new(),
            site: Mutex::new(None),
        }
    }

    /// Runs the `number`th test on this lane's site, between two looks at the host, when it is its turn.
    pub(crate) fn run(&self, number: usize, name: &str, test: impl FnOnce(&mut Site)) {
        let mut queue = locked(&self.queue);
        queue.waiting.insert(number);
        let mut queue = self
            .freed
            .wait_while(queue, |queue| {
                queue.busy || queue.waiting.first() != Some(&number)
            })
            .unwrap_or_else(PoisonError::into_inner);
        queue.waiting.remove(&number);
        queue.busy = true;
        drop(queue);
        let working = RESTED.wait_while(locked(&WORKING), |working| *working == AT_ONCE);
        *working.unwrap_or_else(PoisonError::into_inner) += 1;
        let tried = catch_unwind(AssertUnwindSafe(|| watched(name, || self.run_now(test))));
        *locked(&WORKING) -= 1;
        RESTED.notify_one();
        locked(&self.queue).busy = false;
        self.freed.notify_all();
        if let Err(panic) = tried {
            resume_unwind(panic);
        }
    }

    fn run_now(&self, test: impl FnOnce(&mut Site)) {
        let mut slot = locked(&self.site);
        let site = slot.get_or_insert_with(self.start);
        let tried = catch_unwind(AssertUnwindSafe(|| {
            let before = site.marks();
            test(site);
            before.assert_same(&site.marks());
        }));
        if let Err(panic) = tried {
            let said = site.said();
            let lines: Vec<_> = said.lines().collect();
            let last = lines.len().saturating_sub(40);
            eprintln!("the daemon's last words:\n{}", lines[last..].join("\n"));
            // What a failed test has left is no ground for the next.
            *slot = None;
            resume_unwind(panic);
        }
    }
}
