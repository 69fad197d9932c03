//! Draws the model, in whatever room there is: graphs, facts and the hottest keys, facts alone, or as
//! much of one line as fits.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Borders, Paragraph, RenderDirection, Sparkline};

use super::model::{Fact, Model, Mood, Rates};
use super::plain;
use super::words::{age, count, rate};

/// A graph: its title and three lines of bars.
const GRAPH_HEIGHT: u16 = 4;
/// Columns that the name of a fact takes.
const NAME_WIDTH: usize = 22;

/// Draws everything; `paused`: what is shown is not what is now.
pub fn draw(frame: &mut Frame<'_>, model: &Model, paused: bool) {
    let area = frame.area();
    let facts = facts(model);
    let rates_height = if area.height >= 2 + 2 * GRAPH_HEIGHT + facts.len().min(4) as u16 {
        2 * GRAPH_HEIGHT
    } else {
        // No room for graphs: the numbers alone.
        2
    };
    let [title, rates, rest, footer] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(rates_height),
        Constraint::Fill(1),
        Constraint::Length(1),
    ])
    .areas(area);

    frame.render_widget(title_line(model, paused), title);
    if model.is_known() {
        draw_rates(frame, model, rates);
        let [facts_area, hot] =
            Layout::vertical([Constraint::Length(facts.len() as u16), Constraint::Fill(1)])
                .areas(rest);
        frame.render_widget(Paragraph::new(facts), facts_area);
        draw_hot(frame, model, hot);
    }
    let keys = Line::from("q quit   p pause").style(Style::new().add_modifier(Modifier::DIM));
    frame.render_widget(keys, footer);
}

fn title_line(model: &Model, paused: bool) -> Line<'static> {
    let bold = Style::new().add_modifier(Modifier::BOLD);
    if let Some((reason, since)) = model.away() {
        let text = format!("AWAY for {}, trying on: {reason}", age(since));
        return Line::styled(text, bold.fg(Color::Red));
    }
    if !model.is_known() {
        return Line::styled(format!("asking {} …", model.socket.display()), bold);
    }
    let mut spans = vec![Span::styled(model.title(), bold)];
    if paused {
        spans.push(Span::styled("  PAUSED", bold.fg(Color::Yellow)));
    }
    spans.push(Span::raw(format!("  {}", model.socket.display())));
    Line::from(spans)
}

/// One rate over time.
struct Graph {
    name: &'static str,
    of: fn(&Rates) -> f64,
    /// What else its title says.
    more: String,
    colour: Color,
}

fn draw_rates(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let graphs = [
        Graph {
            name: "increments in",
            of: |rates| rates.increments,
            more: String::new(),
            colour: Color::Cyan,
        },
        Graph {
            name: "commands out",
            of: |rates| rates.commands,
            more: format!(", {}", plain::ratio(model)),
            colour: Color::Green,
        },
    ];
    let areas: [Rect; 2] = Layout::vertical([Constraint::Fill(1); 2]).areas(area);
    for (area, graph) in areas.into_iter().zip(graphs) {
        // The newest stands at the right, one column for each.
        let bars = model.history().take(area.width as usize).map(graph.of);
        let bars: Vec<u64> = bars.map(|rate| rate.ceil() as u64).collect();
        let title = format!(
            "{}: {}/s (peak {}){}",
            graph.name,
            rate((graph.of)(&model.rates().unwrap_or_default())),
            // What the highest bar stands for.
            count(bars.iter().max().copied().unwrap_or(0)),
            graph.more
        );
        let bars = Sparkline::default()
            .block(Block::new().borders(Borders::TOP).title(title))
            .data(bars)
            .direction(RenderDirection::RightToLeft)
            .style(Style::new().fg(graph.colour));
        frame.render_widget(bars, area);
    }
}

/// As many of the hottest keys as there are lines for.
fn draw_hot(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    if area.height < 2 || model.hot().is_empty() {
        return;
    }
    let lines: Vec<Line<'static>> = model
        .hot()
        .iter()
        .take(area.height as usize - 1)
        .map(|key| Line::from(format!("{:>NAME_WIDTH$}  {}", plain::change(key), key.key)))
        .collect();
    let block = Block::new()
        .borders(Borders::TOP)
        .title("hottest keys of the last flushes, by change");
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn facts(model: &Model) -> Vec<Line<'static>> {
    let line = |fact: Fact| {
        let style = match fact.mood {
            Mood::Well => Style::new(),
            Mood::Look => Style::new().fg(Color::Yellow),
            Mood::Bad => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
        };
        let name = format!("{:<NAME_WIDTH$}", fact.name);
        Line::from(vec![
            Span::raw(name),
            Span::styled(format!("{}{}", plain::mark(&fact), fact.value), style),
        ])
    };
    model.facts().into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::tests::{model, sample};
    use super::super::source::{Answer, HotKey};
    use super::*;

    /// What a terminal of this size shows, a string a line.
    fn shown(model: &Model, (width, height): (u16, u16), paused: bool) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model, paused)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y| {
            let cells = (0..width).map(|x| buffer[(x, y)].symbol());
            cells.collect::<String>().trim_end().to_owned()
        };
        (0..height).map(row).collect()
    }

    fn busy() -> Model {
        let begin = Instant::now();
        model((0..10).map(|second| {
            let numbers = [
                ("increments_total", 5000 * second * second),
                ("flushed_keys_total", 10 * second),
                ("store_up", 1),
                ("subscribed", 1),
                ("peers", 2),
            ];
            sample(begin, second, &numbers, "")
        }))
    }

    #[test]
    fn a_usual_terminal_has_graphs_and_facts() {
        let lines = shown(&busy(), (80, 24), false);
        let text = lines.join("\n");
        assert!(lines[0].starts_with("tallyd 0.1.0, up 1 h 2 min"), "{text}");
        assert!(
            lines[1].starts_with("increments in: 85,000/s (peak 85,000)──"),
            "{text}"
        );
        assert!(
            lines[5].starts_with("commands out: 10/s (peak 10), 4,500 increments a command─"),
            "{text}"
        );
        // Nine rates, growing to the right: the last bar fills all three lines.
        let bar = |y: usize| lines[y].chars().last().unwrap();
        assert_eq!([bar(2), bar(3), bar(4)], ['█'; 3], "{text}");
        assert_eq!(lines[4].chars().filter(|c| *c != ' ').count(), 9, "{text}");
        assert_eq!(lines[9], format!("{:<22}up", "store"), "{text}");
        assert!(text.contains("2, lag 0 ms, 0 gaps"), "{text}");
        assert!(text.contains("damaged files"), "{text}");
        assert_eq!(lines[23], "q quit   p pause", "{text}");
        assert!(!text.contains("PAUSED"), "{text}");
        assert!(shown(&busy(), (80, 24), true)[0].contains("PAUSED"));
    }

    #[test]
    fn the_hottest_keys_take_the_room_that_is_left() {
        let mut hot = sample(Instant::now(), 0, &[], "");
        hot.hot = (0..50)
            .map(|n| HotKey {
                key: format!("likes:{n}"),
                change: 5000 - n,
                error: n,
            })
            .collect();
        let hot = model([hot]);
        let lines = shown(&hot, (80, 24), false);
        let text = lines.join("\n");
        assert!(lines[18].starts_with("hottest keys of"), "{text}");
        assert_eq!(lines[19], format!("{:>22}  likes:0", "5,000"), "{text}");
        assert_eq!(
            lines[22],
            format!("{:>22}  likes:3", "4,994–4,997"),
            "{text}"
        );
        assert_eq!(lines[23], "q quit   p pause", "{text}");
        assert!(!shown(&hot, (80, 19), false).join("\n").contains("hottest"));
        assert!(
            shown(&hot, (80, 100), false)
                .join("\n")
                .contains("likes:49")
        );
        for height in 1..40 {
            assert_eq!(shown(&hot, (10, height), false).len(), height as usize);
        }
    }

    #[test]
    fn what_is_wrong_is_marked_and_coloured() {
        let ill = model([sample(Instant::now(), 0, &[], "READONLY")]);
        let mut terminal = Terminal::new(TestBackend::new(60, 20)).unwrap();
        terminal.draw(|frame| draw(frame, &ill, false)).unwrap();
        let cell = &terminal.backend().buffer()[(NAME_WIDTH as u16, 9)];
        assert_eq!((cell.symbol(), cell.fg), ("!", Color::Red));
        let text = shown(&ill, (60, 20), false).join("\n");
        assert!(text.contains("!! trouble: READONLY"), "{text}");
    }

    #[test]
    fn a_daemon_that_is_away_is_said_to_be_above_its_last_numbers() {
        let mut model = busy();
        model.take(Answer::Away("/s: connection refused".to_owned()));
        let lines = shown(&model, (80, 24), false);
        assert!(lines[0].starts_with("AWAY for "), "{lines:?}");
        assert!(
            lines[0].ends_with(" s, trying on: /s: connection refused"),
            "{lines:?}"
        );
        assert!(lines[1].starts_with("increments in: "), "{lines:?}");

        let never = Model::new("/s".into());
        let lines = shown(&never, (80, 24), false);
        assert_eq!(lines[0], "asking /s …");
        assert!(lines[1..23].iter().all(String::is_empty), "{lines:?}");
    }

    #[test]
    fn no_terminal_is_too_small() {
        for model in [busy(), Model::new("/s".into())] {
            for width in [1, 2, 5, 20, 80, 300] {
                for height in [1, 2, 3, 5, 9, 13, 14, 60] {
                    assert_eq!(shown(&model, (width, height), false).len(), height as usize);
                }
            }
        }
        let lines = shown(&busy(), (20, 5), false);
        assert_eq!(lines[0], "tallyd 0.1.0, up 1 h");
        assert!(lines[1].starts_with("increments in: 85,00"), "{lines:?}");
        assert!(lines[2].starts_with("commands out: 10/s"), "{lines:?}");
        assert!(lines[3].starts_with("store"), "{lines:?}");
        assert_eq!(lines[4], "q quit   p pause");
    }
}
