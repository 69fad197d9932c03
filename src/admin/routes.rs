//! What is answered to each path.

use http_body_util::BodyExt;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName,
    HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use hyper::{Method, Request, Response, StatusCode};

use super::Context;
use super::body::{Body, line, whole};
use super::feed::{Feed, STREAMS_MAX};
use super::guard::{self, Hosts};
use super::metrics;
use super::page::page;
use super::places::CONNECTIONS_MAX;
use crate::health::Phase;

/// The paths that there are.
const PATHS: &str = "/ /healthz /readyz /metrics";
/// Of these, what may be asked where every other place is taken.
const HEALTH: [&str; 2] = ["/healthz", "/readyz"];
/// What is no page needs no right to anything.
const NOTHING: HeaderValue = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
const EVENTS: HeaderValue = HeaderValue::from_static("text/event-stream");
/// Headers of every answer.
const ALWAYS: [(HeaderName, HeaderValue); 4] = [
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
    (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        HeaderValue::from_static("same-origin"),
    ),
];

/// What a connection may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asks {
    /// All that there is.
    Anything,
    /// Health alone: the places for more are taken.
    Health,
}

/// Answers a request.
pub fn answer<B: hyper::body::Body>(
    request: &Request<B>,
    asks: Asks,
    context: &Context,
    hosts: &Hosts,
) -> Response<Body> {
    let mut response = match guard::check(request, hosts) {
        Err((status, why)) => line(status, why),
        Ok(()) if ![Method::GET, Method::HEAD].contains(request.method()) => {
            let mut response = line(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD");
            response
                .headers_mut()
                .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            response
        }
        Ok(()) if asks == Asks::Health && !HEALTH.contains(&request.uri().path()) => {
            let why = format!(
                "{CONNECTIONS_MAX} connections are busy; until one ends only {} are answered",
                HEALTH.join(" and ")
            );
            line(StatusCode::SERVICE_UNAVAILABLE, &why)
        }
        Ok(()) => route(request.uri().path(), context),
    };
    let headers = response.headers_mut();
    for (name, value) in ALWAYS {
        headers.insert(name, value);
    }
    headers.entry(CONTENT_SECURITY_POLICY).or_insert(NOTHING);
    if !request.body().is_end_stream() {
        // What was sent along is not read, so nothing behind it can be either.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn route(path: &str, context: &Context) -> Response<Body> {
    match path {
        "/" => page(),
        "/events" => events(context),
        "/healthz" => healthz(context),
        "/readyz" => readyz(context),
        "/metrics" => whole(metrics::CONTENT_TYPE, metrics::render(context)),
        _ => line(
            StatusCode::NOT_FOUND,
            &format!("not found; there are: {PATHS}"),
        ),
    }
}

/// Whether the process does its work; a store that is away is no reason to restart it.
fn healthz(context: &Context) -> Response<Body> {
    match context.health.stuck() {
        None => line(StatusCode::OK, "ok"),
        Some(who) => line(StatusCode::SERVICE_UNAVAILABLE, &format!("{who} is stuck")),
    }
}

/// Whether clients are accepted, and their increments taken.
fn readyz(context: &Context) -> Response<Body> {
    let not_ready = match (context.health.phase(), context.health.stuck()) {
        (Phase::Starting, _) => "starting: the journal is being recovered",
        (Phase::Stopping, _) => "stopping: no more connections, a last flush",
        (Phase::Ready, Some(_)) => return healthz(context),
        (Phase::Ready, None) => match context.health.gone() {
            None => return line(StatusCode::OK, "ready"),
            Some(gone) => gone,
        },
    };
    line(StatusCode::SERVICE_UNAVAILABLE, not_ready)
}

/// The feed of the page.
fn events(context: &Context) -> Response<Body> {
    let Some(events) = Feed::stream(context) else {
        let text = format!("{STREAMS_MAX} pages are open; close one");
        return line(StatusCode::SERVICE_UNAVAILABLE, &text);
    };
    let mut response = Response::new(events.boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, EVENTS);
    response
}
