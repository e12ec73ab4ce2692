//! Teams and keys: what is another team's is not found, whichever way it is asked for; nobody has more than they may; and
//! every change has somebody who asked for it.

use std::thread;

use serde_json::{Value, json};

use crate::support::{Daemon, Transcript, request};

/// A client with a key.
struct Member {
    address: String,
    header: String,
}

impl Member {
    /// One of a team that is made if it does not exist.
    fn of(daemon: &Daemon, team: &str) -> Self {
        daemon.run(&["team", "create", team]);
        let made = daemon.get(&["--json", "--team", team, "key", "create", "--name", "ci"]);
        let made: Value = serde_json::from_str(&made).unwrap();
        Self {
            address: daemon.address(),
            header: format!("x-api-key: {}\r\n", made["key"].as_str().unwrap()),
        }
    }

    /// Asks for something, and returns the status and the body.
    fn ask(&self, line: &str, body: &str) -> (u16, String) {
        self.ask_with(line, "", body)
    }

    fn ask_with(&self, line: &str, headers: &str, body: &str) -> (u16, String) {
        let headers = format!("{}{headers}", self.header);
        let answer = request(&self.address, line, &headers, body);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    fn create(&self, template: &str) -> (u16, Value) {
        let body = json!({ "templateID": template }).to_string();
        let (status, body) = self.ask("POST /v2/sandboxes", &body);
        (status, serde_json::from_str(&body).unwrap())
    }
}

fn id_of(daemon: &Daemon, sandbox: &str) -> String {
    let detail = daemon.get(&["--json", "inspect", sandbox]);
    let detail: Value = serde_json::from_str(&detail).unwrap();
    detail["sandboxID"].as_str().unwrap().to_owned()
}

#[test]
fn inv_42_what_is_another_teams_is_not_found_on_any_route() {
    let daemon = Daemon::start().with_template();
    daemon.get(&["create", "base", "--name", "web"]);
    daemon.get(&["snapshot", "web", "--name", "warm"]);
    let id = id_of(&daemon, "web");
    let acme = Member::of(&daemon, "acme");
    let name = r#"{"name":"mine"}"#;
    let routes = [
        ("GET /sandboxes/{}", ""),
        ("GET /sandboxes/{}?space=true", ""),
        ("DELETE /sandboxes/{}", ""),
        ("POST /sandboxes/{}/pause", ""),
        ("POST /sandboxes/{}/resume", ""),
        ("POST /sandboxes/{}/stop", ""),
        ("POST /sandboxes/{}/start", ""),
        ("POST /sandboxes/{}/checkpoints", ""),
        ("POST /sandboxes/{}/rollback", r#"{"to":"1"}"#),
        ("GET /sandboxes/{}/history", ""),
        ("DELETE /sandboxes/{}/history/1", ""),
        ("POST /sandboxes/{}/snapshots", name),
        ("POST /sandboxes/{}/fork", ""),
        ("POST /sandboxes/{}/flatten", name),
        ("POST /sandboxes/{}/timeout", r#"{"timeout":60}"#),
        ("GET /sandboxes/{}/metrics", ""),
        ("GET /sandboxes/{}/console", ""),
        ("GET /templates/{}", ""),
        ("DELETE /templates/{}", ""),
    ];
    // What is there and another team's is answered in the very words for what is not there at all.
    for (route, body) in routes {
        let there = match route.contains("/templates/") {
            true => ["warm", "base", "default%2Fwarm"],
            false => [id.as_str(), "web", "default%2Fweb"],
        };
        let line = route.replace("{}", "nothing");
        let (status, nothing) = acme.ask(&line, body);
        assert_eq!(status, 404, "{line}: {nothing}");
        for wanted in there {
            let line = route.replace("{}", wanted);
            let (status, said) = acme.ask(&line, body);
            let plain = wanted.replace("%2F", "/");
            let said = said.replace(&format!(r#"\"{plain}\""#), r#"\"nothing\""#);
            assert_eq!((status, said), (404, nothing.clone()), "{line}");
        }
    }
    assert_eq!(acme.create("warm").0, 404);
    assert_eq!(acme.create(&id).0, 404);
    for list in ["GET /sandboxes", "GET /v2/sandboxes", "GET /templates"] {
        assert_eq!(acme.ask(list, ""), (200, "[]".to_owned()), "{list}");
    }
    // Nor do its ports open, nor is it told of.
    let routing = format!("e2b-sandbox-id: {id}\r\ne2b-sandbox-port: 80\r\n");
    let (status, said) = acme.ask_with("GET /", &routing, "");
    assert_eq!(status, 502);
    assert!(said.contains("The sandbox was not found"), "{said}");
    let (status, told) = acme.ask("GET /events?since=0", "");
    assert!(status == 200 && !told.contains('{'), "{told}");
    assert_eq!(id_of(&daemon, "web"), id, "it is still there");
}

#[test]
fn each_team_has_its_own_names_and_what_is_published_is_everybodys() {
    let daemon = Daemon::start().with_template();
    let acme = Member::of(&daemon, "acme");
    assert_eq!(acme.create("base").0, 404);
    let mut transcript = Transcript::new(&daemon);
    transcript
        .run("template publish base")
        .run("create base --name web")
        .run("--team acme create base --name web")
        .run("ls")
        .run("--team acme ls")
        .run("--team acme template ls")
        .run("--team acme snapshot web --name base")
        .run("template ls")
        .run("--team acme template ls")
        .run("template publish acme/base")
        .run("--team acme template rm default/base")
        .run("--team nobody ls")
        .run("team create acme")
        .run("team create ../acme")
        .run("team set acme --running 2 --memory 4G")
        .run("team ls")
        .run("team rm acme")
        .run("rm web")
        .run("rm acme/web")
        .run("template rm acme/base")
        .run("team rm acme")
        .run("team rm default")
        .run("team ls");
    insta::assert_snapshot!(transcript.text());
    let (status, said) = acme.ask("GET /sandboxes", "");
    assert_eq!(status, 401, "its keys went with it: {said}");
}

#[test]
fn a_key_that_was_removed_lets_nobody_in() {
    let daemon = Daemon::start();
    let acme = Member::of(&daemon, "acme");
    assert_eq!(acme.ask("GET /sandboxes", "").0, 200);
    let listed = daemon.get(&["--team", "acme", "--json", "key", "ls"]);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let key = &listed.as_array().unwrap()[0];
    assert_eq!((&key["team"], &key["name"]), (&json!("acme"), &json!("ci")));
    let id = key["id"].as_str().unwrap();
    let wrong = daemon.run(&["--team", "default", "key", "rm", id]);
    assert!(!wrong.status.success(), "it is another team's");
    daemon.get(&["key", "rm", id]);
    assert_eq!(acme.ask("GET /sandboxes", "").0, 401);
}

#[test]
fn a_team_has_no_more_than_it_may_however_many_ask_at_once() {
    let daemon = Daemon::start().with_template();
    daemon.get(&["template", "publish", "base"]);
    let acme = Member::of(&daemon, "acme");
    daemon.get(&["team", "set", "acme", "--running", "3"]);
    let answers: Vec<_> = thread::scope(|scope| {
        let clients: Vec<_> = (0..12)
            .map(|_| scope.spawn(|| acme.create("base")))
            .collect();
        clients.into_iter().map(|it| it.join().unwrap()).collect()
    });
    let with = |wanted| {
        answers
            .iter()
            .filter(|(status, _)| *status == wanted)
            .count()
    };
    assert_eq!((with(201), with(429)), (3, 9), "{answers:?}");
    let (_, refused) = answers.iter().find(|(status, _)| *status == 429).unwrap();
    assert_eq!(refused["code"], 429);
    assert_eq!(refused["error_code"], "limit_reached");
    let said = refused["message"].as_str().unwrap();
    assert!(
        said.contains("team acme may have 3 running sandboxes"),
        "{said}"
    );
    let made = answers.iter().find(|(status, _)| *status == 201).unwrap();
    let id = made.1["sandboxID"].as_str().unwrap();
    assert!(said.contains(id), "who has them is named: {said}");
    // A fork is one more, and so is a resume when another has come instead.
    let (status, said) = acme.ask(&format!("POST /sandboxes/{id}/fork"), "");
    assert_eq!(status, 429, "{said}");
    assert_eq!(acme.ask(&format!("POST /sandboxes/{id}/pause"), "").0, 204);
    assert_eq!(acme.create("base").0, 201);
    let (status, said) = acme.ask(&format!("POST /sandboxes/{id}/resume"), "");
    assert_eq!(status, 429, "{said}");
    // Others have theirs.
    daemon.get(&["create", "base"]);
}

#[test]
fn every_change_has_somebody_who_asked_for_it() {
    let daemon = Daemon::start().with_template();
    daemon.get(&["template", "publish", "base"]);
    let acme = Member::of(&daemon, "acme");
    let (_, made) = acme.create("base");
    let id = made["sandboxID"].as_str().unwrap();
    assert_eq!(acme.create("nothing").0, 404);
    assert_eq!(acme.ask(&format!("POST /sandboxes/{id}/pause"), "").0, 204);
    daemon.get(&["rm", id]);
    let read = |options: &[&str]| -> Vec<Value> {
        let entries = daemon.get(&[options, &["--json", "audit"]].concat());
        let entries = entries.lines();
        entries
            .map(|it| serde_json::from_str(it).unwrap())
            .collect()
    };
    let told = |entries: &[Value]| -> Vec<(String, String, String)> {
        let text = |it: &Value| it.as_str().unwrap_or("-").to_owned();
        let row = |it: &Value| (text(&it["verb"]), text(&it["target"]), text(&it["outcome"]));
        entries.iter().map(row).collect()
    };
    let row = |verb: &str, target: &str, outcome: &str| {
        (verb.to_owned(), target.to_owned(), outcome.to_owned())
    };
    let all = read(&[]);
    let key = all
        .iter()
        .find(|it| it["verb"] == "key.create" && it["team"] == "acme");
    let key = key.unwrap()["target"].as_str().unwrap().to_owned();
    let uid = std::fs::metadata(daemon.path("socket")).unwrap();
    let local = format!("local:{}", std::os::unix::fs::MetadataExt::uid(&uid));
    let of_acme = read(&["--team", "acme"]);
    assert_eq!(
        told(&of_acme),
        [
            row("key.create", &key, "done"),
            row("sandbox.create", id, "done"),
            row("sandbox.create", "", "not_found"),
            row("sandbox.pause", id, "done"),
        ]
    );
    assert_eq!(of_acme[0]["actor"], local.as_str());
    assert_eq!(of_acme[1]["actor"], format!("key:{key}").as_str());
    let last = all.last().unwrap();
    assert_eq!(
        told(&all[all.len() - 1..]),
        [row("sandbox.destroy", id, "done")]
    );
    assert_eq!(last["actor"], local.as_str());
    assert_eq!(last["team"], Value::Null);
    let verbs: Vec<_> = told(&all).into_iter().map(|(verb, ..)| verb).collect();
    assert!(verbs.contains(&"template.build".to_owned()), "{verbs:?}");
    assert!(verbs.contains(&"template.publish".to_owned()), "{verbs:?}");
    // Keys are in it by their ids alone (INV-43).
    let secret = acme.header.trim_start_matches("x-api-key: e2b_").trim_end();
    assert!(!all.iter().any(|it| it.to_string().contains(secret)));
}
