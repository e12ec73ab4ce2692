//! Pages of a list that changes while it is read: a cursor names the last item of a page, not a place in the list, so that
//! what comes and goes between two pages shifts nothing.

use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderName, HeaderValue};
use jiff::Timestamp;
use serde::Serialize;

use crate::{ApiError, ErrorCode};

/// Has the next page's cursor; absent from the last page.
const NEXT_TOKEN: HeaderName = HeaderName::from_static("x-next-token");
/// The most items of a page, and how many there are if nothing is said.
const LIMIT: i64 = 100;

/// Where an item is in a list: by time, and then by id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    /// In microseconds since 1970.
    micros: i64,
    id: String,
}

impl Position {
    pub(super) fn new(at: Timestamp, id: &str) -> Self {
        Self {
            micros: at.as_microsecond(),
            id: id.to_owned(),
        }
    }

    fn to_token(&self) -> String {
        URL_SAFE_NO_PAD.encode(format!("{}__{}", self.micros, self.id))
    }

    fn parse(token: &str) -> Option<Self> {
        let text = String::from_utf8(URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
        let (micros, id) = text.split_once("__")?;
        Some(Self {
            micros: micros.parse().ok()?,
            id: id.to_owned(),
        })
    }
}

/// Which page is asked for.
#[derive(Debug, Default)]
pub(super) struct Asked {
    limit: Option<i64>,
    after: Option<Position>,
}

impl Asked {
    /// Takes a parameter of the query, if it is one about pages.
    pub(super) fn take(&mut self, name: &str, value: &str) -> Result<(), ApiError> {
        let invalid = |message: String| ApiError::new(ErrorCode::Invalid, message);
        match name {
            "limit" => {
                let limit = value.parse().ok().filter(|it| (1..=LIMIT).contains(it));
                let limit = limit.ok_or_else(|| {
                    invalid(format!("limit is {value:?}, and has to be 1 to {LIMIT}"))
                })?;
                self.limit = Some(limit);
            }
            // None that was given, but what clients make of none.
            "nextToken" if value.is_empty() => {}
            "nextToken" => {
                let after = Position::parse(value);
                let after = after
                    .ok_or_else(|| invalid("nextToken is none that a list has given".to_owned()))?;
                self.after = Some(after);
            }
            _ => {}
        }
        Ok(())
    }

    /// The page of `items`, which need not be in order.
    pub(super) fn of<T: Serialize>(
        self,
        mut items: Vec<(Position, T)>,
        ascending: bool,
    ) -> Response {
        items.sort_by(|(a, _), (b, _)| if ascending { a.cmp(b) } else { b.cmp(a) });
        if let Some(after) = self.after {
            items.retain(|(at, _)| if ascending { *at > after } else { *at < after });
        }
        let limit = usize::try_from(self.limit.unwrap_or(LIMIT)).unwrap_or(usize::MAX);
        let is_last = items.len() <= limit;
        items.truncate(limit);
        let next = items.last().filter(|_| !is_last);
        let next = next.map(|(at, _)| at.to_token());
        let items: Vec<T> = items.into_iter().map(|(_, item)| item).collect();
        let mut answer = axum::Json(items).into_response();
        if let Some(Ok(next)) = next.map(HeaderValue::try_from) {
            answer.headers_mut().insert(NEXT_TOKEN, next);
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(asked: &[(&str, &str)], ascending: bool) -> (String, Option<String>) {
        let mut wanted = Asked::default();
        for (name, value) in asked {
            wanted.take(name, value).expect("understood");
        }
        let at = |second| Timestamp::from_second(second).expect("a time");
        let items = [(1, "a"), (2, "b"), (2, "c"), (3, "d")];
        let items = items.map(|(second, id)| (Position::new(at(second), id), id));
        let answer = wanted.of(items.to_vec(), ascending);
        let next = answer.headers().get(NEXT_TOKEN);
        let next = next.map(|next| next.to_str().expect("text").to_owned());
        let body = axum::body::to_bytes(answer.into_body(), 1 << 10);
        let body = futures_util::FutureExt::now_or_never(body).expect("it is all there");
        let ids: Vec<String> = serde_json::from_slice(&body.expect("a body")).expect("JSON");
        (ids.concat(), next)
    }

    #[test]
    fn pages_have_every_item_once_and_the_last_says_so() {
        for (ascending, all) in [(false, "dcba"), (true, "abcd")] {
            assert_eq!(page(&[], ascending), (all.to_owned(), None));
            assert_eq!(page(&[("limit", "4")], ascending), (all.to_owned(), None));
            let (first, next) = page(&[("limit", "2")], ascending);
            let next = next.expect("there is more");
            let (second, end) = page(&[("limit", "2"), ("nextToken", &next)], ascending);
            assert_eq!((first + &second, end), (all.to_owned(), None));
        }
    }

    #[test]
    fn what_is_no_page_is_refused() {
        for (name, value) in [
            ("limit", "0"),
            ("limit", "101"),
            ("nextToken", "?"),
            ("nextToken", "AAAA"),
        ] {
            assert!(
                Asked::default().take(name, value).is_err(),
                "{name}={value}"
            );
        }
        assert!(Asked::default().take("order", "up").is_ok(), "another's");
    }
}
