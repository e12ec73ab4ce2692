//! Lifetimes, from the wire's words to the engine's and back.

use std::time::Duration;

use icebox_api::types::{
    ChangeLifetime, DrainReport, Lifecycle, Limit, NewSandbox, NotDrained, OnTimeout,
};
use icebox_api::{ApiError, ErrorCode};
use icebox_engine::manifest::v1;
use icebox_engine::{Drained, LifetimeChange};

use super::translate;

/// What a request asks to be changed.
pub(super) fn change(asked: &ChangeLifetime) -> Result<LifetimeChange, ApiError> {
    Ok(LifetimeChange {
        idle: asked.idle_timeout.map(limit).transpose()?,
        run: asked.timeout.map(limit).transpose()?,
        then: asked.on_timeout.map(|then| match then {
            OnTimeout::Pause => v1::OnTimeout::Pause,
            OnTimeout::Kill => v1::OnTimeout::Destroy,
            OnTimeout::Stop => v1::OnTimeout::Stop,
        }),
        auto_resume: asked.auto_resume.map(|auto_resume| auto_resume.enabled),
    })
}

/// The lifetime of a new sandbox. One that has E2B's time-out and does not say what becomes of it then is killed, as it is
/// there; else it is paused.
pub(super) fn of_new(new: &NewSandbox) -> Result<LifetimeChange, ApiError> {
    if matches!(new.lifetime.timeout, Some(Limit::Seconds(0))) {
        return Err(refused(0));
    }
    let mut lifetime = change(&new.lifetime)?;
    if lifetime.then.is_none() {
        let is_e2b = lifetime.run.is_some() && lifetime.idle.is_none();
        lifetime.then = match new.auto_pause {
            Some(true) if new.auto_pause_memory == Some(false) => Some(v1::OnTimeout::Stop),
            Some(true) => Some(v1::OnTimeout::Pause),
            Some(false) => Some(v1::OnTimeout::Destroy),
            None => is_e2b.then_some(v1::OnTimeout::Destroy),
        };
    }
    Ok(lifetime)
}

fn limit(asked: Limit) -> Result<icebox_engine::Limit, ApiError> {
    match asked {
        Limit::Word(_) => Ok(icebox_engine::Limit::Never),
        Limit::Seconds(seconds) => u64::try_from(seconds)
            .map(|seconds| icebox_engine::Limit::After(Duration::from_secs(seconds)))
            .map_err(|_| refused(seconds)),
    }
}

fn refused(seconds: i64) -> ApiError {
    let message = format!("a sandbox's time cannot be {seconds} s");
    ApiError::new(ErrorCode::Invalid, message).hint("ask for whole seconds, or `never`")
}

/// A sandbox's lifetime, if it has one to speak of.
pub(super) fn shown(lifetime: &v1::Lifetime) -> Option<Lifecycle> {
    let is_forever = lifetime.idle_seconds.is_none() && lifetime.run_seconds.is_none();
    if is_forever && !lifetime.auto_resume {
        return None;
    }
    Some(Lifecycle {
        auto_resume: lifetime.auto_resume,
        on_timeout: match lifetime.then {
            v1::OnTimeout::Pause => OnTimeout::Pause,
            v1::OnTimeout::Destroy => OnTimeout::Kill,
            v1::OnTimeout::Stop => OnTimeout::Stop,
        },
        timeout: lifetime.run_seconds,
        idle_timeout: lifetime.idle_seconds,
    })
}

/// What a drain did.
pub(super) fn drained(drained: Drained) -> DrainReport {
    let failed = drained.failed.into_iter().map(|(sandbox, error)| {
        let error = translate::error(&error).into_body();
        NotDrained { sandbox, error }
    });
    DrainReport {
        paused: drained.paused,
        failed: failed.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn then(body: &str) -> Option<v1::OnTimeout> {
        let new: NewSandbox = serde_json::from_str(body).expect("a request");
        of_new(&new).expect("a lifetime").then
    }

    #[test]
    fn e2b_kills_unless_it_is_told_to_pause_and_we_pause() {
        let destroy = Some(v1::OnTimeout::Destroy);
        let pause = Some(v1::OnTimeout::Pause);
        assert_eq!(then(r#"{"timeout": 300}"#), destroy);
        assert_eq!(then(r#"{"timeout": 300, "autoPause": true}"#), pause);
        assert_eq!(then(r#"{"timeout": 300, "autoPause": false}"#), destroy);
        assert_eq!(then(r#"{"idleTimeout": 300}"#), None);
        assert_eq!(
            then(r#"{"idleTimeout": 300, "onTimeout": "kill"}"#),
            destroy
        );
    }

    #[test]
    fn times_are_whole_seconds_or_never() {
        let asked = |body| serde_json::from_str::<ChangeLifetime>(body);
        let never = asked(r#"{"timeout": "never", "idleTimeout": 5}"#).expect("a request");
        let never = change(&never).expect("a change");
        assert_eq!(never.run, Some(icebox_engine::Limit::Never));
        let seconds = icebox_engine::Limit::After(Duration::from_secs(5));
        assert_eq!(never.idle, Some(seconds));
        let negative = asked(r#"{"timeout": -1}"#).expect("a request");
        assert!(change(&negative).is_err());
        assert!(asked(r#"{"timeout": "soon"}"#).is_err());
        let new: NewSandbox = serde_json::from_str(r#"{"timeout": 0}"#).expect("a request");
        assert!(of_new(&new).is_err(), "a sandbox that would end at once");
    }
}
