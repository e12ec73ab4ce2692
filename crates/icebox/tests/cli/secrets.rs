//! INV-43: what is secret is in no log, event, argument or output that anybody keeps.

use crate::support::Daemon;

#[test]
fn inv_43_tokens_keys_and_environment_values_are_in_no_log_and_no_event() {
    let daemon = Daemon::start_with(&["--log", "trace"]).with_guest();
    let key = daemon.api_key();
    let value = "correct-horse-battery-staple";
    daemon.get(&[
        "create",
        "base",
        "--name",
        "quiet",
        "--env",
        &format!("PASSWORD={value}"),
    ]);
    daemon.get(&["exec", "-e", &format!("OTHER={value}"), "web", "--", "true"]);
    let token = daemon.token_of("web");
    daemon.get(&["pause", "quiet"]);
    let events = daemon.get(&["--json", "events", "--since", "0", "--no-follow"]);
    let shown = daemon.get(&["--json", "inspect", "quiet"]) + &daemon.get(&["--json", "ls"]);
    let arguments = std::fs::read(format!("/proc/{}/cmdline", daemon.pid())).unwrap();
    let arguments = String::from_utf8_lossy(&arguments).into_owned();
    let (_, log) = daemon.stop();
    assert!(
        log.contains("sandbox.paused"),
        "the log has something to say"
    );
    for (place, text) in [
        ("log", log),
        ("events", events),
        ("output", shown),
        ("arguments", arguments),
    ] {
        assert!(
            !text.contains(value),
            "an environment value is in the {place}"
        );
        assert!(!text.contains(&token), "a token is in the {place}");
        assert!(!text.contains(&key), "the API key is in the {place}");
    }
}
