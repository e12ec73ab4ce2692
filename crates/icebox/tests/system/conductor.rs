//! Who decides what each step of a daemon does: the other end of `icebox_sim::fault::conducted`.
//!
//! A step is a call of one of the engine's driver traits, on one side of its effect. One of them can be held, so that the
//! daemon, or its VMM, can be killed at exactly that moment; or it fails.

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::site::patience;

/// Steps that change nothing and are taken whenever somebody looks: nothing is different before and after them.
const LOOKS: [&str; 9] = [
    "store.allocated",
    "store.file_size",
    "store.space",
    "volume.space",
    "volume.probe",
    "volume.head_usage",
    "volume.layer_usage",
    "network.probe",
    "store.load",
];

/// On which side of its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Before,
    After,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Say {
    /// It waits, until it is told to go on or its daemon is killed.
    Hold,
    /// It fails, as on a full file system.
    Full,
}

/// What becomes of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Its number since the plan was made, from 0.
    pub(crate) at: usize,
    pub(crate) side: Side,
    pub(crate) say: Say,
    /// Which steps are counted, by name; all of them if none is named.
    pub(crate) of: &'static [&'static str],
}

/// How far something came.
#[derive(Debug)]
pub(crate) enum Reached {
    /// The step that is held.
    Held(String),
    /// It ended, and never reached it.
    Ended(ExitStatus),
}

/// Conducts until it is dropped.
pub(crate) struct Conductor {
    socket: PathBuf,
    score: Arc<Score>,
}

#[derive(Default)]
struct Score {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Which plan this is. What was begun under an earlier one goes on.
    number: usize,
    plan: Option<Plan>,
    steps: Vec<String>,
    held: Option<(String, UnixStream)>,
    ended: Option<ExitStatus>,
}

impl Conductor {
    /// Conducts the daemon that looks for its conductor at `socket`.
    pub(crate) fn at(socket: &Path) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let score = Arc::<Score>::default();
        let shared = Arc::clone(&score);
        // Ends with the test program, as do its connections' threads unless the daemon ends first.
        thread::spawn(move || {
            for step in listener.incoming() {
                let (step, score) = (step.unwrap(), Arc::clone(&shared));
                thread::spawn(move || score.conduct(&step));
            }
        });
        Self {
            socket: socket.to_owned(),
            score,
        }
    }

    /// Counts from 0 again, with this ahead, or nothing.
    pub(crate) fn plan(&self, plan: Option<Plan>) {
        let mut state = self.score.lock();
        *state = State {
            number: state.number + 1,
            plan,
            ..State::default()
        };
    }

    /// The steps that have begun since the plan was made.
    pub(crate) fn steps(&self) -> Vec<String> {
        self.score.lock().steps.clone()
    }

    /// Waits until the planned step is held, or until this client, whose verb it should be a step of, has ended.
    pub(crate) fn watch(&self, mut client: Child) -> Reached {
        let (number, score) = (self.score.lock().number, Arc::clone(&self.score));
        thread::spawn(move || {
            let status = client.wait().unwrap();
            let mut state = score.lock();
            if state.number == number {
                state.ended = Some(status);
                score.changed.notify_all();
            }
        });
        self.wait(|state| {
            let held = state
                .held
                .as_ref()
                .map(|(step, _)| Reached::Held(step.clone()));
            held.or(state.ended.map(Reached::Ended))
        })
    }

    /// Holds the first of these steps that a client's verb takes, before its effect.
    #[track_caller]
    pub(crate) fn hold(&self, of: &'static [&'static str], client: Child) {
        self.plan(Some(Plan {
            at: 0,
            side: Side::Before,
            say: Say::Hold,
            of,
        }));
        let reached = self.watch(client);
        assert!(matches!(reached, Reached::Held(_)), "{reached:?}");
    }

    /// Lets the step that is held go on, and waits for the client's end.
    pub(crate) fn go_on(&self) -> ExitStatus {
        let held = self.score.lock().held.take();
        let (_, mut step) = held.expect("a step is held");
        answer(&mut step, "go on");
        self.wait(|state| state.ended)
    }

    fn wait<T>(&self, until: impl Fn(&State) -> Option<T>) -> T {
        let mut state = self.score.lock();
        loop {
            if let Some(reached) = until(&state) {
                return reached;
            }
            let limit = patience(Duration::from_secs(120));
            let waited = self.score.changed.wait_timeout(state, limit);
            let (next, waited) = waited.unwrap_or_else(PoisonError::into_inner);
            assert!(
                !waited.timed_out(),
                "nothing happens after {:?}",
                next.steps
            );
            state = next;
        }
    }
}

impl Drop for Conductor {
    /// The daemon's steps go on from here by themselves.
    fn drop(&mut self) {
        std::fs::remove_file(&self.socket).unwrap_or_default();
        self.plan(None);
    }
}

impl Score {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers one step, on both of its sides.
    fn conduct(&self, step: &UnixStream) {
        let mut place = None;
        for question in BufReader::new(step).lines() {
            let Ok(question) = question else { return };
            let (side, name) = question.split_once(' ').unwrap();
            let side = match side {
                "before" => Side::Before,
                _ => Side::After,
            };
            let mut to = step;
            match self.decide(side, name, step, &mut place) {
                None => answer(&mut to, "go on"),
                Some(Say::Full) => answer(&mut to, "full"),
                Some(Say::Hold) => {}
            }
        }
    }

    /// What is to be said to a step, whose number, and the plan's when it began, are in `place`.
    fn decide(
        &self,
        side: Side,
        name: &str,
        step: &UnixStream,
        place: &mut Option<(usize, usize)>,
    ) -> Option<Say> {
        if LOOKS.contains(&name) {
            return None;
        }
        let mut state = self.lock();
        let counted = state
            .plan
            .is_none_or(|plan| plan.of.is_empty() || plan.of.contains(&name));
        if side == Side::Before && counted {
            *place = Some((state.number, state.steps.len()));
            state.steps.push(name.to_owned());
        }
        let plan = state.plan?;
        if *place != Some((state.number, plan.at)) || plan.side != side {
            return None;
        }
        if plan.say == Say::Hold {
            state.held = Some((name.to_owned(), step.try_clone().unwrap()));
            self.changed.notify_all();
        }
        Some(plan.say)
    }
}

/// A daemon that has been killed hears nothing.
fn answer(mut step: impl std::io::Write, word: &str) {
    writeln!(step, "{word}").unwrap_or_default();
}
