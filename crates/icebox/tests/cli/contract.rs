//! E2B's contract where its SDKs do not look, or look only when something goes wrong: what is refused and how, and how
//! clients write things. What they do look at is in `system/sdk`.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::support::{Daemon, request};

/// What is one daemon's client.
struct Client {
    address: String,
    key: String,
}

struct Answer {
    status: u16,
    head: String,
    body: Value,
}

impl Client {
    fn of(daemon: &Daemon) -> Self {
        Self {
            address: daemon.address(),
            key: format!("x-api-key: {}\r\n", daemon.api_key()),
        }
    }

    fn ask(&self, line: &str, body: &str) -> Answer {
        read(&request(&self.address, line, &self.key, body))
    }

    /// A new sandbox's id.
    fn create(&self, more: &Value) -> String {
        let mut body = json!({"templateID": "base", "timeout": 300});
        let (body, more) = (body.as_object_mut().unwrap(), more.as_object().unwrap());
        body.extend(more.clone());
        let made = self.ask("POST /v2/sandboxes", &json!(body).to_string());
        assert_eq!(made.status, 201, "{}", made.body);
        made.body["sandboxID"].as_str().unwrap().to_owned()
    }

    fn seconds_left(&self, id: &str) -> i64 {
        let found = self.ask(&format!("GET /sandboxes/{id}"), "");
        let end: Timestamp = found.body["endAt"].as_str().unwrap().parse().unwrap();
        end.duration_since(Timestamp::now()).as_secs()
    }
}

fn read(answer: &str) -> Answer {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    Answer {
        status: head[9..12].parse().unwrap(),
        head: head.to_lowercase(),
        body: match body {
            "" => Value::Null,
            body => serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}")),
        },
    }
}

#[test]
fn every_refusal_has_its_status_and_is_e2bs_json() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    let id = client.create(&json!({}));
    let rows: Vec<(String, &str, u16)> = [
        ("GET /", "", 404),
        ("GET /nothing", "", 404),
        ("GET /v2", "", 404),
        ("GET /v2/sandboxes/x/y/z", "", 404),
        ("PATCH /sandboxes", "", 405),
        ("PUT /v2/sandboxes", "", 405),
        ("GET /templates/tags", "", 405),
        ("GET /sandboxes/%ff", "", 400),
        ("DELETE /templates/%ff%fe", "", 400),
        ("GET /sandboxes/%00", "", 404),
        ("GET /v2/sandboxes?limit=0", "", 400),
        ("GET /v2/sandboxes?limit=101", "", 400),
        ("GET /v2/sandboxes?nextToken=x", "", 400),
        ("GET /v2/sandboxes?state=gone", "", 400),
        ("GET /snapshots?limit=x", "", 400),
        ("GET /sandboxes/ID/metrics?start=x", "", 400),
        ("GET /v2/sandboxes/ID/logs?direction=up", "", 400),
        ("POST /v2/sandboxes", "[]", 400),
        ("POST /v2/sandboxes", "{", 400),
        ("POST /v2/sandboxes", "\"text\"", 400),
        ("POST /v2/sandboxes", r#"{"templateID": "none"}"#, 404),
        ("POST /v2/sandboxes", r#"{"templateID": ""}"#, 404),
        ("POST /v2/sandboxes", r#"{"timeout": 0}"#, 400),
        ("POST /v2/sandboxes", r#"{"timeout": -1}"#, 400),
        (
            "POST /v2/sandboxes",
            r#"{"timeout": 9223372036854775807}"#,
            400,
        ),
        ("POST /sandboxes", r#"{"timeout": 1.5}"#, 400),
        ("POST /v2/sandboxes", r#"{"autoPauseMemory": false}"#, 400),
        ("POST /v2/sandboxes", r#"{"metadata": {"a": 1}}"#, 400),
        ("POST /v2/sandboxes", r#"{"mcp": {"x": {}}}"#, 501),
        (
            "POST /v2/sandboxes",
            r#"{"network": {"denyOut": ["x"]}}"#,
            400,
        ),
        ("POST /sandboxes/ID/connect", "", 400),
        ("POST /sandboxes/ID/connect", r#"{"timeout": -1}"#, 400),
        ("POST /sandboxes/ID/timeout", "", 400),
        ("POST /sandboxes/ID/timeout", r#"{"timeout": -1}"#, 400),
        ("POST /sandboxes/ID/refreshes", r#"{"duration": -1}"#, 400),
        ("POST /sandboxes/ID/fork", r#"{"count": 0}"#, 400),
        ("POST /sandboxes/ID/fork", r#"{"count": 101}"#, 400),
        ("POST /sandboxes/ID/resume", "", 409),
        (
            "PUT /sandboxes/ID/network",
            r#"{"allowOut": ["example.org"]}"#,
            400,
        ),
        ("GET /volumes", "", 501),
        ("POST /secrets/some", "", 501),
        ("GET /volumecontent/some/path?path=x", "", 501),
        ("GET /templates/aliases/none", "", 404),
        ("GET /templates/none/tags", "", 404),
        (
            "POST /templates/tags",
            r#"{"target": "none:x", "tags": ["y"]}"#,
            404,
        ),
        ("POST /templates/tags", r#"{"target": "none:x"}"#, 400),
        (
            "DELETE /templates/tags",
            r#"{"name": "none", "tags": ["default"]}"#,
            400,
        ),
        (
            "DELETE /templates/tags",
            r#"{"name": "none", "tags": ["x"]}"#,
            404,
        ),
        ("POST /v3/templates", "{}", 400),
        ("GET /templates/none/files/short", "", 400),
        ("GET /templates/none/builds/none/status", "", 404),
        ("POST /v2/templates/none/builds/none", "", 404),
        ("PUT /uploads/none", "x", 404),
        ("GET /sandboxes/missing", "", 404),
        ("DELETE /sandboxes/missing", "", 404),
        ("POST /sandboxes/missing/timeout", r#"{"timeout": 1}"#, 404),
        ("POST /sandboxes/missing/pause", "", 404),
        ("POST /sandboxes/missing/pause", r#"{"memory": false}"#, 404),
        ("POST /sandboxes/missing/resume", "", 404),
        ("POST /sandboxes/missing/connect", r#"{"timeout": 1}"#, 404),
        ("POST /v2/sandboxes/missing/connect", "", 404),
        ("POST /sandboxes/missing/fork", "", 404),
        ("POST /sandboxes/missing/snapshots", "", 404),
        ("PUT /sandboxes/missing/network", "{}", 404),
        ("GET /sandboxes/missing/metrics", "", 404),
        ("GET /sandboxes/missing/logs", "", 404),
        ("DELETE /templates/team%2Fsnap%3Av1", "", 404),
    ]
    .map(|(line, body, status)| (line.replace("ID", &id), body, status))
    .to_vec();
    for (line, body, status) in rows {
        let answer = client.ask(&line, body);
        assert_eq!(answer.status, status, "{line} {body}: {}", answer.body);
        assert_eq!(answer.body["code"], status, "{line}");
        assert!(answer.body["message"].is_string(), "{line}");
        assert!(answer.head.contains("content-type: application/json"));
        assert!(answer.head.contains("access-control-allow-origin: *"));
    }
    let stranger = read(&request(&client.address, "GET /v2/sandboxes", "", ""));
    assert_eq!(
        (stranger.status, &stranger.body["code"]),
        (401, &json!(401))
    );
    // Nobody's, and it tells nothing.
    assert_eq!(
        read(&request(&client.address, "GET /health", "", "")).status,
        204
    );
}

#[test]
fn paths_and_ids_are_taken_as_clients_write_them() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    let id = client.create(&json!({}));
    for line in [
        "GET /sandboxes/",
        "GET //v2//sandboxes/?limit=1",
        "GET /sandboxes/ID/",
        "GET /sandboxes/ID-6532622b",
        "GET /sandboxes/ID-6532622b/metrics",
        "GET /v2/sandboxes/ID-6532622b/logs?limit=1",
        "POST /v2/sandboxes/ID-6532622b/connect",
        "GET /snapshots?sandboxID=ID-6532622b&nextToken=",
    ] {
        let answer = client.ask(&line.replace("ID", &id), "");
        assert_eq!(answer.status, 200, "{line}: {}", answer.body);
    }
    let routed = |id: &str| {
        let headers = format!("e2b-sandbox-id: {id}\r\ne2b-sandbox-port: 1\r\n");
        read(&request(&client.address, "GET /", &headers, ""))
    };
    for id in ["NOT-ONE", "a%20b", "", "../x"] {
        let answer = routed(id);
        assert_eq!(answer.status, 400, "{id}: {}", answer.body);
        assert_eq!(answer.body["message"], "Invalid sandbox ID");
        assert!(answer.head.contains("access-control-allow-origin: *"));
    }
    for written in [id.clone(), format!("{id}-6532622b")] {
        let answer = routed(&written);
        let said = answer.body["message"].as_str().unwrap();
        assert!(said.contains("port is not open"), "{}", answer.body);
        assert_eq!(
            (answer.status, &answer.body["sandboxId"]),
            (502, &json!(id))
        );
        assert!(answer.head.contains("access-control-allow-origin: *"));
    }
    assert_eq!(
        client
            .ask(&format!("DELETE /sandboxes/{id}-6532622b"), "")
            .status,
        204
    );
}

#[test]
fn what_was_not_given_may_be_written_as_null() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    client.create(&json!({
        "metadata": null, "envVars": null, "autoPause": null, "autoResume": null, "secure": null, "mcp": null,
        "volumeMounts": null, "network": {"allowOut": null, "denyOut": null}, "forceUpload": true,
    }));
    client.create(&json!({"network": null, "allow_internet_access": null}));
}

#[test]
fn what_is_paused_comes_back_for_as_long_as_was_asked() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    let id = client.create(&json!({}));
    let status = |verb: &str, body: &str| {
        let answer = client.ask(&format!("POST /sandboxes/{id}/{verb}"), body);
        (answer.status, answer.body)
    };
    assert_eq!(status("pause", "").0, 204);
    // It would lose its memory.
    assert_eq!(status("pause", r#"{"memory": false}"#).0, 409);
    assert_eq!(status("fork", "").0, 409);
    let (code, sandbox) = status("resume", r#"{"timeout": 600, "autoPause": true}"#);
    assert_eq!(
        (code, &sandbox["state"]),
        (201, &json!("running")),
        "{sandbox}"
    );
    assert_eq!(sandbox["lifecycle"]["onTimeout"], "pause");
    assert!((500..=600).contains(&client.seconds_left(&id)));
    assert_eq!(status("resume", r#"{"timeout": 9}"#).0, 409);
    assert!(
        client.seconds_left(&id) > 500,
        "a refused resume changes nothing"
    );
    // Without its memory, and back by either way.
    for (verb, body, left) in [
        ("resume", "{}", 0..=15),
        ("connect", r#"{"timeout": 600}"#, 500..=600),
    ] {
        assert_eq!(status("pause", r#"{"memory": false}"#).0, 204);
        assert_eq!(status("pause", "").0, 409);
        let (code, sandbox) = status(verb, body);
        assert_eq!(code, 201, "{sandbox}");
        assert!(left.contains(&client.seconds_left(&id)), "{verb}");
    }
    let (code, forks) = status("fork", r#"{"count": 2}"#);
    assert_eq!(code, 201, "{forks}");
    for fork in forks.as_array().unwrap() {
        let fork = fork["sandbox"]["sandboxID"].as_str().unwrap();
        assert!(client.seconds_left(fork) <= 15);
    }
}

#[test]
fn names_lead_to_what_is_built_under_them_and_builds_are_their_templates() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    let alias = client.ask("GET /templates/aliases/base", "");
    assert_eq!((alias.status, &alias.body["public"]), (200, &json!(false)));
    daemon.get(&["template", "publish", "base"]);
    let alias = client.ask("GET /templates/aliases/base", "");
    assert_eq!(alias.body["public"], true);
    let made = client.ask(
        "POST /v3/templates",
        r#"{"name": "app:v1", "tags": ["v2"]}"#,
    );
    assert_eq!(made.status, 202);
    assert_eq!(made.body["tags"], json!(["v1", "v2"]));
    let (template, build) = (&made.body["templateID"], &made.body["buildID"]);
    let alias = client.ask("GET /templates/aliases/app", "");
    assert_eq!(&alias.body["templateID"], template);
    let (template, build) = (template.as_str().unwrap(), build.as_str().unwrap());
    let path = format!("/templates/{template}/builds/{build}");
    let status = client.ask(&format!("GET {path}/status"), "");
    assert_eq!(
        (status.status, &status.body["status"]),
        (200, &json!("waiting"))
    );
    for (line, body, wanted) in [
        (
            format!("GET /templates/other/builds/{build}/status"),
            "",
            404,
        ),
        (
            format!("POST /v2/templates/other/builds/{build}"),
            r#"{"fromTemplate": "base"}"#,
            404,
        ),
        (format!("POST /v2{path}"), "{}", 400),
        (
            format!("POST /v2{path}"),
            r#"{"fromTemplate": "none"}"#,
            404,
        ),
        (
            format!("POST /v2{path}"),
            r#"{"fromImage": "ubuntu:24.04"}"#,
            501,
        ),
        (
            format!("POST /v2{path}"),
            r#"{"fromImage": "base", "fromImageRegistry": {"type": "aws"}}"#,
            501,
        ),
        (
            format!("POST /v2{path}"),
            r#"{"fromTemplate": "base", "steps": [{"type": "VOLUME"}]}"#,
            400,
        ),
    ] {
        let answer = client.ask(&line, body);
        assert_eq!(answer.status, wanted, "{line} {body}: {}", answer.body);
    }
}

#[test]
fn snapshots_have_names_with_tags_and_each_is_removed_by_itself() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    let id = client.create(&json!({}));
    let take = |name: &str| {
        let body = json!({ "name": name }).to_string();
        client.ask(&format!("POST /sandboxes/{id}/snapshots"), &body)
    };
    let remove = |name: &str| {
        let name = name.replace('/', "%2F").replace(':', "%3A");
        client.ask(&format!("DELETE /templates/{name}"), "").status
    };
    for tag in ["v1", "v2"] {
        let taken = take(&format!("snap:{tag}"));
        assert_eq!(taken.status, 201, "{}", taken.body);
        assert_eq!(taken.body["names"][0], format!("snap:{tag}"));
    }
    assert_eq!(take("base:v1").status, 409);
    assert_eq!(take("snap:V1").status, 400);
    assert_eq!(take("a:b:c").status, 400);
    let named = client.ask("GET /snapshots?name=snap%3Av2", "");
    assert_eq!(named.body.as_array().map(Vec::len), Some(1));
    let of_tag = client.create(&json!({"templateID": "default/snap:v1"}));
    let shown = client.ask(&format!("GET /sandboxes/{of_tag}"), "");
    assert_eq!(shown.body["alias"], "snap");
    assert_eq!(
        client
            .ask(&format!("DELETE /sandboxes/{of_tag}"), "")
            .status,
        204
    );
    // What is taken again by the same name is another one.
    let before = client.ask("GET /templates/snap%3Av1", "");
    assert_eq!(take("snap:v1").status, 201);
    let after = client.ask("GET /templates/snap%3Av1", "");
    assert_ne!(before.body["templateID"], after.body["templateID"]);
    assert_eq!(remove("default/snap:v1"), 204);
    assert_eq!(remove("default/snap:v1"), 404);
    assert_eq!(client.ask("GET /templates/snap%3Av2", "").status, 200);
    assert_eq!(remove("snap:v2"), 204);
    assert_eq!(client.ask("GET /templates/aliases/snap", "").status, 404);
}

#[test]
fn templates_have_tags_however_they_were_built_and_not_too_many() {
    let daemon = Daemon::start().with_template();
    let client = Client::of(&daemon);
    let listed = client.ask("GET /templates/base/tags", "");
    assert_eq!(listed.status, 200, "{}", listed.body);
    assert_eq!(listed.body[0]["tag"], "default");
    assert_eq!(listed.body.as_array().unwrap().len(), 1);
    let id = client.ask("GET /templates/aliases/base", "").body["templateID"].clone();
    let by_id = client.ask(&format!("GET /templates/{}/tags", id.as_str().unwrap()), "");
    assert_eq!(by_id.body, listed.body);
    assert_eq!(client.ask("GET /templates/nothing/tags", "").status, 404);
    let tags: Vec<_> = (0..101).map(|n| format!("v{n}")).collect();
    let refused = client.ask(
        "POST /v3/templates",
        &json!({"name": "many", "tags": tags}).to_string(),
    );
    assert_eq!(refused.status, 429, "{}", refused.body);
    let some = json!({"name": "many", "tags": tags[..99]}).to_string();
    let asked = client.ask("POST /v3/templates", &some);
    assert_eq!(asked.status, 202, "{}", asked.body);
}

#[test]
fn a_build_is_there_after_a_restart() {
    let daemon = Daemon::start().with_template();
    let asked = Client::of(&daemon).ask("POST /v3/templates", r#"{"name": "later"}"#);
    let id = |key: &str| asked.body[key].as_str().unwrap().to_owned();
    let path = format!(
        "GET /templates/{}/builds/{}/status",
        id("templateID"),
        id("buildID")
    );
    let before = Client::of(&daemon).ask(&path, "");
    assert_eq!(before.body["status"], "waiting", "{}", before.body);
    let daemon = daemon.restart();
    let after = Client::of(&daemon).ask(&path, "");
    assert_eq!((after.status, after.body), (200, before.body));
}
