//! The live page: one file, which asks for nothing from elsewhere.
//!
//! Keys are chosen by clients, and are shown. So the page's policy lets run only what carries the
//! nonce of this one answer, makes no markup of text, and connects only to where it came from.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hyper::header::{CONTENT_SECURITY_POLICY, HeaderValue};
use hyper::{Response, StatusCode};

use super::body::{Body, line, whole};

const PAGE: &str = include_str!("page.html");
/// Stands in the page where the nonce is to be.
const NONCE: &str = "{nonce}";
const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");

/// Answers `/`.
pub fn page() -> Response<Body> {
    let mut random = [0; 16];
    if getrandom::fill(&mut random).is_err() {
        return line(StatusCode::SERVICE_UNAVAILABLE, "no random numbers");
    }
    let nonce = BASE64_STANDARD.encode(random);
    let mut response = whole(HTML, PAGE.replace(NONCE, &nonce));
    response
        .headers_mut()
        .insert(CONTENT_SECURITY_POLICY, policy(&nonce));
    response
}

fn policy(nonce: &str) -> HeaderValue {
    HeaderValue::try_from(format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'; require-trusted-types-for 'script'"
    ))
    .expect("base64 is made of visible characters")
}
