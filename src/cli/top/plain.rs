//! The same as text, where there is no terminal: a line for each sample, or a block once.

use super::super::check::one_line;
use super::model::{Fact, Model, Mood};
use super::source::HotKey;
use super::words::{age, count, rate};

/// Hottest keys in a block.
const HOT_KEYS: usize = 5;

/// One line about now; `None` until there is a rate to tell.
pub fn line(model: &Model) -> Option<String> {
    if let Some((reason, since)) = model.away() {
        return Some(one_line(&format!("away for {}: {reason}", age(since))));
    }
    let rates = model.rates()?;
    let mut line = format!(
        "in {}/s, out {}/s, {}",
        rate(rates.increments),
        rate(rates.commands),
        ratio(model)
    );
    for fact in model.facts() {
        // What is well and says nothing new is left out.
        if fact.mood != Mood::Well || ["store", "pending", "connections"].contains(&fact.name) {
            line = format!("{line}; {}: {}", fact.name, fact.value);
        }
    }
    Some(one_line(&line))
}

/// Everything, a line each.
pub fn block(model: &Model) -> String {
    let rates = model.rates().unwrap_or_default();
    let rates = [
        ("increments in", format!("{}/s", rate(rates.increments))),
        ("commands out", format!("{}/s", rate(rates.commands))),
        ("ratio", ratio(model)),
    ];
    let facts = model.facts().into_iter().map(|fact| {
        let mark = mark(&fact);
        (fact.name, format!("{mark}{}", fact.value))
    });
    let hot: Vec<String> = model.hot().iter().take(HOT_KEYS).map(hot).collect();
    let hot = (!hot.is_empty()).then(|| ("hottest keys", hot.join(", ")));
    let mut text = format!("{}\n", one_line(&model.title()));
    for (name, value) in rates.into_iter().chain(facts).chain(hot) {
        text = format!("{text}{name:<21} {}\n", one_line(&value));
    }
    text
}

fn hot(key: &HotKey) -> String {
    format!("{} ({})", key.key, change(key))
}

/// By how much a key changed, and how sure that is.
pub fn change(key: &HotKey) -> String {
    match key.error {
        0 => count(key.change),
        error => format!(
            "{}–{}",
            count(key.change.saturating_sub(error)),
            count(key.change)
        ),
    }
}

/// What the increments cost the store.
pub fn ratio(model: &Model) -> String {
    match model.ratio() {
        Some(ratio) => format!("{} increments a command", rate(ratio)),
        None => "nothing sent yet".to_owned(),
    }
}

/// Says without a colour that something is not well.
pub fn mark(fact: &Fact) -> &'static str {
    match fact.mood {
        Mood::Well => "",
        Mood::Look => "! ",
        Mood::Bad => "!! ",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::super::model::tests::{model, sample};
    use super::super::source::Answer;
    use super::*;

    fn two(error: &str) -> Model {
        let begin = Instant::now();
        let numbers = |increments, commands| {
            [
                ("increments_total", increments),
                ("flushed_keys_total", commands),
                ("connections", 3),
                ("store_up", 1),
                ("subscribed", 1),
            ]
        };
        model([
            sample(begin, 0, &numbers(0, 0), error),
            sample(begin, 1, &numbers(120_000, 60), error),
        ])
    }

    #[test]
    fn a_line_says_what_matters_and_what_is_wrong() {
        assert_eq!(
            line(&two("")).unwrap(),
            "in 120,000/s, out 60/s, 2,000 increments a command; store: up; pending: 0 keys; \
             connections: 3, 0 refused"
        );
        let ill = line(&two("a\u{1b}[31m\nb")).unwrap();
        assert!(ill.contains("store: trouble: a\\u{1b}[31m"), "{ill}");
    }

    #[test]
    fn the_block_ends_with_the_hottest_keys() {
        let mut one = sample(Instant::now(), 0, &[], "");
        one.hot = (1..=6)
            .map(|n| HotKey {
                key: format!("k{n}"),
                change: 1000 * n,
                error: n % 2,
            })
            .collect();
        let text = block(&model([one]));
        assert_eq!(
            text.lines().last().unwrap(),
            "hottest keys          k1 (999–1,000), k2 (2,000), k3 (2,999–3,000), k4 (4,000), k5 (4,999–5,000)"
        );
    }

    #[test]
    fn nothing_is_said_before_there_is_a_rate_and_an_absence_is() {
        let mut model = model([sample(Instant::now(), 0, &[], "")]);
        assert_eq!(line(&model), None);
        model.take(Answer::Away("s: connection refused".to_owned()));
        let away = line(&model).unwrap();
        assert!(away.starts_with("away for "), "{away}");
        assert!(away.ends_with(" s: s: connection refused"), "{away}");
    }

    #[test]
    fn the_block_has_every_fact_and_marks_what_is_wrong() {
        let text = block(&two("gone"));
        assert!(text.starts_with("tallyd 0.1.0, up 1 h 2 min\n"), "{text}");
        assert!(text.contains("increments in         120,000/s\n"), "{text}");
        assert!(
            text.contains("store                 !! trouble: gone\n"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 4 + two("").facts().len());
    }
}
