//! Which requests are let in: what keeps the pages of strangers out of the operator's browser.
//!
//! A browser on this host reaches the address though the network does not. So a request must name
//! a host that no stranger's name can stand for (DNS rebinding), and must not come from another
//! site's page. A link from elsewhere to a page here may be followed.

use std::net::{IpAddr, SocketAddr};

use hyper::header::{HOST, HeaderMap, HeaderValue, ORIGIN};
use hyper::{Request, StatusCode, Version};

/// What is expected in a request's `Host`.
#[derive(Debug, Clone)]
pub enum Hosts {
    /// Any: no browser can be led to a Unix socket.
    Any,
    /// An address, `localhost`, or this name.
    Known(String),
}

/// Why a request is not answered.
pub type Refusal = (StatusCode, &'static str);

/// Checks a request's headers.
pub fn check<B>(request: &Request<B>, hosts: &Hosts) -> Result<(), Refusal> {
    let host = host(request)?;
    if let (Hosts::Known(name), Some(host)) = (hosts, host)
        && !is_known(host, name)
    {
        return Err((
            StatusCode::MISDIRECTED_REQUEST,
            "Host must be an address, localhost, or node.name",
        ));
    }
    if !same_site(request.headers(), host) {
        return Err((
            StatusCode::FORBIDDEN,
            "pages of other sites may not read this",
        ));
    }
    Ok(())
}

/// The one host that the request names; none is possible in HTTP/1.0 alone.
fn host<B>(request: &Request<B>) -> Result<Option<&str>, Refusal> {
    let mut named = request.headers().get_all(HOST).iter();
    let refusal = (StatusCode::BAD_REQUEST, "one Host is required");
    match (named.next(), named.next()) {
        (Some(host), None) => text(host).map(Some).ok_or(refusal),
        (None, None) if request.version() == Version::HTTP_10 => Ok(None),
        _ => Err(refusal),
    }
}

fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok()
}

/// Whether a host, with or without a port, is one that nobody else can have a name of.
fn is_known(host: &str, name: &str) -> bool {
    if host.parse::<SocketAddr>().is_ok() || host.parse::<IpAddr>().is_ok() {
        return true;
    }
    // An address of version 6 with a port has been read above.
    if let Some(inner) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return inner.parse::<IpAddr>().is_ok();
    }
    let (domain, port) = host.split_once(':').unwrap_or((host, "0"));
    if port.parse::<u16>().is_err() {
        return false;
    }
    domain.eq_ignore_ascii_case("localhost")
        || (!name.is_empty() && domain.eq_ignore_ascii_case(name))
}

/// Whether the request comes from no page, from a page of ours, or follows a link to here.
fn same_site(headers: &HeaderMap, host: Option<&str>) -> bool {
    let is = |name: &str, value: &str| headers.get(name).is_some_and(|found| found == value);
    let site = match headers.get("sec-fetch-site") {
        None => true,
        Some(site) => {
            site == "same-origin"
                || site == "none"
                || (is("sec-fetch-mode", "navigate") && is("sec-fetch-dest", "document"))
        }
    };
    let origin = headers.get(ORIGIN).is_none_or(|origin| {
        text(origin)
            .and_then(|origin| origin.split_once("://"))
            .is_some_and(|(_, authority)| Some(authority) == host)
    });
    site && origin
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Hosts {
        Hosts::Known("web-7".to_owned())
    }

    fn checked(headers: &[(&str, &str)], hosts: &Hosts) -> u16 {
        let mut request = Request::new(());
        for (name, value) in headers {
            let name = hyper::header::HeaderName::try_from(*name).unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        check(&request, hosts).map_or_else(|(status, _)| status.as_u16(), |()| 200)
    }

    #[test]
    fn a_host_must_be_one_that_no_stranger_can_name() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:9464",
            "10.1.2.3:80",
            "[::1]",
            "[::1]:9464",
            "localhost",
            "LOCALHOST:1",
            "web-7:9464",
            "Web-7",
        ] {
            assert_eq!(checked(&[("host", host)], &known()), 200, "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9464",
            "localhost.evil.example",
            "web-7.evil.example",
            "127.0.0.1.evil.example",
            "localhost:evil",
            "127.0.0.1:99999",
            "",
            "[evil]",
            "user@localhost",
        ] {
            assert_eq!(checked(&[("host", host)], &known()), 421, "{host}");
            assert_eq!(checked(&[("host", host)], &Hosts::Any), 200, "{host}");
        }
    }

    #[test]
    fn there_is_exactly_one_host() {
        assert_eq!(checked(&[], &known()), 400);
        assert_eq!(checked(&[], &Hosts::Any), 400);
        let two = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(checked(&two, &known()), 400);
        // A probe that speaks HTTP/1.0 need not name one; no browser does so.
        let mut old = Request::new(());
        *old.version_mut() = Version::HTTP_10;
        assert!(check(&old, &known()).is_ok());
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let with = |more: &[(&str, &str)]| {
            let mut headers = vec![("host", "localhost:9464")];
            headers.extend_from_slice(more);
            [checked(&headers, &known()), checked(&headers, &Hosts::Any)]
        };
        for site in ["cross-site", "same-site", "x"] {
            assert_eq!(with(&[("sec-fetch-site", site)]), [403; 2], "{site}");
            let framed = [
                ("sec-fetch-site", site),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "iframe"),
            ];
            assert_eq!(with(&framed), [403; 2], "{site}, in a frame");
            let followed = [
                ("sec-fetch-site", site),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "document"),
            ];
            assert_eq!(with(&followed), [200; 2], "{site}, by a link");
        }
        assert_eq!(with(&[("sec-fetch-site", "same-origin")]), [200; 2]);
        assert_eq!(with(&[("sec-fetch-site", "none")]), [200; 2]);
        for origin in [
            "https://evil.example",
            "null",
            "",
            "http://localhost:8080",
            "http://localhost",
        ] {
            assert_eq!(with(&[("origin", origin)]), [403; 2], "{origin}");
        }
        assert_eq!(with(&[("origin", "http://localhost:9464")]), [200; 2]);
    }
}
