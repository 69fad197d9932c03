//! Answers, and what they carry.

use std::convert::Infallible;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

const TEXT: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");

/// A whole body, or a stream.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A line of text.
pub fn line(status: StatusCode, text: &str) -> Response<Body> {
    let mut response = whole(TEXT, format!("{text}\n"));
    *response.status_mut() = status;
    response
}

/// A whole body.
pub fn whole(content_type: HeaderValue, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}
