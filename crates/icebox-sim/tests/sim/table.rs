//! The table in `docs/lifecycle.md`, row by row: what the next start finds when the daemon is killed on the way.
//!
//! Every verb is killed before and after every step, with both kinds of volume driver, and the daemon started again. Steps
//! after which the next start finds the same are one row. The test fails when the document has another table; with
//! `ICEBOX_BLESS=1` in the environment it writes its own there.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::scene::Scene::{self, *};
use crate::support::{leave_nothing, life, open};
use icebox_engine::id::seeded;
use icebox_engine::manifest::v1::Rest;
use icebox_engine::{Engine, Error, SandboxView};
use icebox_sim::fault::{Fault, Injector, Kind, When, inject};
use icebox_sim::{FreezeBy, World};

const BEGIN: &str = "<!-- begin: killed on the way -->\n";
const END: &str = "<!-- end -->\n";

/// Every verb, in words.
const VERBS: [(Scene, &str); 29] = [
    (CreateFromImage, "create, from an image"),
    (CreateFromSnapshot, "create, from a snapshot"),
    (PauseFirst, "pause"),
    (PauseSecond, "pause, again"),
    (Resume, "resume"),
    (ResumeGeneration, "resume --generation 1, of a stopped one"),
    (Start, "start"),
    (StopRunning, "stop, of a running one"),
    (StopPaused, "stop, of a paused one"),
    (Checkpoint, "checkpoint"),
    (RollbackRunning, "rollback --to 1, of a running one"),
    (
        RollbackAndResume,
        "rollback --to 1 --resume, of a running one",
    ),
    (RollbackPaused, "rollback --to 1, of a paused one"),
    (RollbackStopped, "rollback --to 1, of a stopped one"),
    (RollbackToBranch, "rollback to a branch, of a running one"),
    (
        RollbackPausedToBranch,
        "rollback to a branch, of a paused one",
    ),
    (ForgetGeneration, "history rm, of a generation"),
    (ForgetBranch, "history rm, of a branch"),
    (SnapshotRunning, "snapshot, of a running one"),
    (SnapshotPaused, "snapshot, of a paused one"),
    (ForkRunning, "fork, of a running one"),
    (ForkPaused, "fork, of a paused one"),
    (FlattenRunning, "flatten, of a running one"),
    (FlattenPaused, "flatten, of a paused one"),
    (FlattenStopped, "flatten, of a stopped one"),
    (DestroyRunning, "rm, of a running one"),
    (DestroyPaused, "rm, of a paused one"),
    (DestroyStopped, "rm, of a stopped one"),
    (RemoveTemplate, "template rm"),
];

/// What the next start finds, from one point of a verb on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    /// The step that makes the difference.
    since: String,
    finds: String,
}

/// Kills the engine at one step of a verb, and starts another.
fn killed(scene: Scene, freeze: FreezeBy, fault: Option<Fault>) -> (Vec<&'static str>, String) {
    let (world, injector) = (World::new(), Injector::new());
    // The same steps in the same order every time, also where they are those of several sandboxes.
    seeded::begin(1);
    let host = || inject(world.host(freeze), &injector);
    let trace = life(async || {
        let engine = open(host()).await;
        scene.set(&world, &engine).await;
        quiet().await;
        injector.arm(fault);
        let done: Option<Result<(), Error>> = tokio::select! {
            biased;
            () = injector.reached() => None,
            done = act(scene, &engine) => Some(done),
        };
        if let Some(done) = done {
            done.unwrap();
        }
        injector.trace()
    });
    injector.arm(None);
    let finds = life(async || {
        let engine = open(host()).await;
        quiet().await;
        let finds = describe(&engine);
        leave_nothing(&world, &engine).await;
        finds
    });
    (trace, finds)
}

/// One fork: each of several is created by itself, and how far one of them is says nothing about the others.
async fn act(scene: Scene, engine: &Engine) -> Result<(), Error> {
    match scene {
        ForkRunning | ForkPaused => {
            let forks = engine.fork("subject", 1).await?;
            forks.into_iter().try_for_each(|fork| fork.map(drop))
        }
        _ => scene.act(engine).await,
    }
}

/// Lets everything that is under way end. The clock jumps, so this takes no time.
async fn quiet() {
    tokio::time::sleep(Duration::from_secs(10_000)).await;
}

/// What there is, as a user sees it.
fn describe(engine: &Engine) -> String {
    let views = engine.list();
    let is_subject = |view: &&SandboxView| {
        let name = view.record.name.as_ref();
        name.is_some_and(|name| name.as_str() == "subject")
    };
    let mut said = match views.iter().find(is_subject) {
        None => vec!["no sandbox".to_owned()],
        Some(view) => sandbox(view),
    };
    if views.iter().any(|view| !is_subject(&view)) {
        said.push("the fork".to_owned());
    }
    if engine.template("made").is_ok() {
        said.push("the template".to_owned());
    }
    if engine.template("warm").is_ok() {
        said.push("the snapshot template".to_owned());
    }
    said.join("; ")
}

fn sandbox(view: &SandboxView) -> Vec<String> {
    let record = &view.record;
    assert_eq!((&record.broken, &record.intent), (&None, &None));
    let phase = match record.rests {
        Rest::Paused { generation } => format!("paused at {generation}"),
        Rest::Stopped => "stopped".to_owned(),
        Rest::Running => "running".to_owned(),
        Rest::Nowhere => "on its way out".to_owned(),
    };
    let numbers: Vec<_> = record.generations.iter().map(ToString::to_string).collect();
    let mut said = vec![phase];
    if !numbers.is_empty() {
        said.push(format!("generations {}", numbers.join(", ")));
    }
    if !record.branches.is_empty() {
        said.push(format!("branches: {}", record.branches.len()));
    }
    said
}

/// What the next start finds after each step of a verb.
fn rows(scene: Scene, freeze: FreezeBy) -> Vec<Row> {
    let (trace, done) = killed(scene, freeze, None);
    let mut rows: Vec<Row> = Vec::new();
    let mut seen = BTreeMap::<&str, usize>::new();
    let mut note = |since: &str, finds: String| {
        if rows.last().is_none_or(|row| row.finds != finds) {
            rows.push(Row {
                since: since.to_owned(),
                finds,
            });
        }
    };
    for (at, step) in trace.iter().enumerate() {
        let times = seen.entry(step).or_default();
        *times += 1;
        let step = format!("`{step}` {times}");
        for when in [When::Before, When::After] {
            let kind = Kind::Crash;
            let (_, finds) = killed(scene, freeze, Some(Fault { at, when, kind }));
            note(&step, finds);
        }
    }
    // What a start has to finish is finished by it: no verb is more done than after its last step.
    assert_eq!(rows.last().unwrap().finds, done, "{scene:?}, {freeze:?}");
    rows
}

fn table() -> String {
    let mut table = "| verb | killed | the next start finds |\n|---|---|---|\n".to_owned();
    for (scene, verb) in VERBS {
        let by_vmm = rows(scene, FreezeBy::Vmm);
        let by_host = rows(scene, FreezeBy::Host);
        let same = by_vmm == by_host;
        let both = [
            (by_vmm, " (the VMM freezes)"),
            (by_host, " (the host freezes)"),
        ];
        for (rows, who) in both.into_iter().take(if same { 1 } else { 2 }) {
            let who = if same { "" } else { who };
            let mut verb = format!("{verb}{who}");
            for (at, row) in rows.iter().enumerate() {
                let until = rows.get(at + 1).map(|next| next.since.as_str());
                let killed = match (at, until) {
                    (_, None) if at == 0 => "at any step".to_owned(),
                    (0, Some(until)) => format!("before {until}"),
                    (_, Some(until)) => format!("then, before {until}"),
                    (_, None) => "after that".to_owned(),
                };
                table.push_str(&format!("| {verb} | {killed} | {} |\n", row.finds));
                verb.clear();
            }
        }
    }
    table
}

#[test]
fn inv_30_the_document_says_what_the_next_start_finds() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/lifecycle.md");
    let document = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).unwrap();
    let (has, after) = rest.split_once(END).unwrap();
    let table = table();
    if std::env::var_os("ICEBOX_BLESS").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
        return;
    }
    for (has, found) in has.lines().zip(table.lines()) {
        assert_eq!(has, found, "docs/lifecycle.md has another row");
    }
    assert_eq!(has, table, "docs/lifecycle.md has other rows");
}
