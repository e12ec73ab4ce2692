//! Teams: what is another's does not exist, and nobody has more than their team may have, however many ask at once.

use crate::stories::story;
use crate::support::{IMAGE, create, from, named};
use icebox_engine::{Engine, Error, Holdings, Quota};

const TEAM: &str = "acme";

fn acme(engine: &Engine) -> Engine {
    engine.of_team(TEAM.parse().unwrap())
}

/// What a look-up says of what is not there, with the name taken out.
fn unknown<T>(found: Result<T, Error>) -> String {
    match found.map(drop) {
        Err(error @ Error::Unknown { .. }) => {
            let Error::Unknown { wanted, .. } = &error else {
                unreachable!("matched above");
            };
            error.to_string().replace(&format!("{wanted:?}"), "…")
        }
        other => panic!("it can be told from nothing: {other:?}"),
    }
}

#[test]
fn inv_42_what_another_team_has_does_not_exist() {
    story(async |_, engine| {
        let id = create(engine, "a").await;
        engine.pause("a").await.unwrap();
        engine.snapshot("a", "warm".parse().unwrap()).await.unwrap();
        let acme = acme(engine);
        assert!(acme.list().is_empty() && acme.templates().is_empty());
        let nothing = unknown(acme.inspect("nothing"));
        for wanted in [id.as_str(), "a", &id.as_str()[..6], "default/a"] {
            assert_eq!(unknown(acme.inspect(wanted)), nothing, "{wanted}");
            assert_eq!(unknown(acme.resume(wanted, None).await), nothing);
            assert_eq!(unknown(acme.fork(wanted, 1).await), nothing);
            assert_eq!(unknown(acme.destroy(wanted).await), nothing);
            assert_eq!(unknown(acme.history(wanted).await), nothing);
            assert_eq!(unknown(acme.route_awake(wanted).await), nothing);
        }
        let nothing = unknown(acme.template("nothing"));
        assert_eq!(unknown(acme.template("warm")), nothing);
        assert_eq!(unknown(acme.create(from(IMAGE)).await), nothing);
        assert_eq!(unknown(acme.remove_template("warm").await), nothing);
        assert_eq!(unknown(acme.publish_template("warm", true).await), nothing);
    });
}

#[test]
fn a_public_template_is_everybodys_to_use_and_its_teams_to_change() {
    story(async |_, engine| {
        let acme = acme(engine);
        engine.publish_template(IMAGE, true).await.unwrap();
        acme.create(named(IMAGE, "a")).await.unwrap();
        // The same name is another team's, too.
        create(engine, "a").await;
        assert_eq!(acme.list().len(), 1);
        assert_eq!(engine.list().len(), 2);
        let own = engine.inspect("a").unwrap().record;
        assert!(own.spec.team.is_default());
        let theirs = engine.inspect("acme/a").unwrap().record;
        assert_eq!(theirs.spec.team.as_str(), TEAM);
        unknown(acme.remove_template(IMAGE).await);
        // What a team makes is its own, and comes before what is public.
        acme.flatten("a", IMAGE.parse().unwrap()).await.unwrap();
        let made = acme.template(IMAGE).unwrap();
        assert_eq!(made.team.as_str(), TEAM);
        assert!(engine.template(IMAGE).unwrap().team.is_default());
        // Among public templates a name means one thing.
        let refused = acme.publish_template(IMAGE, true).await;
        assert!(matches!(refused, Err(Error::NameTaken { .. })));
        engine.publish_template(IMAGE, false).await.unwrap();
        engine.publish_template("acme/image", true).await.unwrap();
        // A fork is its sandbox's team's, whoever makes it.
        let forks = engine.fork("acme/a", 1).await.unwrap();
        for fork in forks {
            assert_eq!(fork.unwrap().record.spec.team.as_str(), TEAM);
        }
    });
}

#[test]
fn a_team_has_no_more_than_it_may_however_many_ask_at_once() {
    story(async |_, engine| {
        engine.publish_template(IMAGE, true).await.unwrap();
        let acme = acme(engine);
        let team = TEAM.parse().unwrap();
        let quota = Quota {
            running: Some(2),
            sandboxes: Some(3),
            ..Quota::default()
        };
        engine.set_quota(TEAM.parse().unwrap(), quota);
        let creates = ["a", "b", "c", "d"].map(|name| acme.create(named(IMAGE, name)));
        let created = futures_util::future::join_all(creates).await;
        let made = created.iter().filter(|it| it.is_ok()).count();
        assert_eq!(made, 2);
        for refused in created.into_iter().filter_map(Result::err) {
            let said = refused.to_string();
            assert_eq!(
                said,
                "team acme may have 2 running sandboxes: 2 are taken by a, b, and this needs 1 more"
            );
        }
        assert_eq!(engine.holdings(&team).running, 2);
        // Another team's limits are not touched by it.
        create(engine, "x").await;

        acme.pause("a").await.unwrap();
        acme.create(named(IMAGE, "c")).await.unwrap();
        let refused = acme.resume("a", None).await.unwrap_err();
        assert!(matches!(refused, Error::OverQuota { .. }), "{refused}");
        // Nor does the administrator's hand give a team more.
        let refused = engine.resume("acme/a", None).await.unwrap_err();
        assert!(matches!(refused, Error::OverQuota { .. }), "{refused}");
        acme.stop("b").await.unwrap();
        acme.resume("a", None).await.unwrap();
        let refused = acme.create(from(IMAGE)).await.unwrap_err().to_string();
        assert!(refused.contains("may have 3 sandboxes"), "{refused}");
        let quota = Quota {
            vcpus: Some(2),
            mem_mib: Some(300),
            disk_mib: Some(200),
            ..Quota::default()
        };
        engine.set_quota(TEAM.parse().unwrap(), quota);
        let refused = acme.start("b").await.unwrap_err().to_string();
        assert!(refused.contains("may have 2 vCPUs"), "{refused}");
        let refused = acme.create(from(IMAGE)).await.unwrap_err().to_string();
        assert!(refused.contains("may have 200 MiB of disk"), "{refused}");
        acme.destroy("c").await.unwrap();
        acme.start("b").await.unwrap();
        let has = Holdings {
            sandboxes: 2,
            running: 2,
            vcpus: 2,
            mem_mib: 256,
            disk_mib: 128,
        };
        assert_eq!(engine.holdings(&team), has);
    });
}
