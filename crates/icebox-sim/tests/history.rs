//! What a sandbox remembers: its generations, its branches, how its last verb went. One test, one promise.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "support/story.rs"]
mod stories;
mod support;

use icebox_engine::{Engine, LastVerb};
use icebox_sim::fault::When;
use stories::{story, story_of_faults};
use support::{create, run};

fn last_verb(engine: &Engine, wanted: &str) -> LastVerb {
    let last = engine.inspect(wanted).unwrap().last_verb;
    LastVerb::clone(&last.unwrap())
}

fn steps(verb: &LastVerb) -> Vec<&str> {
    verb.steps.iter().map(|(step, _)| step.as_str()).collect()
}

#[test]
fn every_verb_says_how_long_its_steps_took() {
    story(async |_, engine| {
        let id = create(engine, "a").await;
        let created = last_verb(engine, "a");
        assert_eq!(created.verb, "create");
        assert_eq!(
            steps(&created),
            ["write-down", "prepare", "launch", "welcome", "commit"]
        );
        engine.pause("a").await.unwrap();
        let paused = last_verb(engine, "a");
        let expected = [
            "drain",
            "probe",
            "begin-freeze",
            "prepare-guest",
            "stage",
            "pause-vcpus",
            "save",
            "flush",
            "freeze",
            "publish",
            "commit",
            "release",
        ];
        assert_eq!(
            (paused.verb.as_str(), steps(&paused)),
            ("pause", expected.to_vec())
        );
        assert!(paused.began_at > created.began_at && paused.error.is_none());
        let told = engine.events().kept(1).events;
        let event = told.iter().find(|event| event.kind == "sandbox.paused");
        assert_eq!(event.unwrap().steps, paused.steps);

        // What finds nothing to do is no verb that anybody asks about.
        engine.pause("a").await.unwrap();
        assert_eq!(last_verb(engine, "a"), paused);
        engine.stop("a").await.unwrap();
        assert_eq!(steps(&last_verb(engine, "a")), ["unpack-disk"]);
        run(engine, &id).await.unwrap();
        assert_eq!(last_verb(engine, "a").verb, "start");
    });
}

#[test]
fn a_verb_that_fails_says_how_far_it_came() {
    story_of_faults(async |_, injector, engine| {
        create(engine, "a").await;
        injector.script("machine.save", [Some(When::Before)]);
        let error = engine.pause("a").await.unwrap_err();
        let last = last_verb(engine, "a");
        assert_eq!(
            (last.verb.as_str(), last.steps.last().unwrap().0.as_str()),
            ("pause", "save")
        );
        assert!(last.error.unwrap().starts_with(&error.to_string()));
    });
}
