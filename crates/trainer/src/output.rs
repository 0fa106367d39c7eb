//! What the program says, and to whom: lines for people on stderr, or JSON objects, one a line, on stdout for programs.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::nearest::printable;
use crate::progress::{AboveBar, EVENTS};

/// To whom the program speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Output {
    /// A person: bars, information, warnings.
    #[default]
    Person,
    /// A person who wants warnings and the result alone.
    Quiet,
    /// A program: every event is a JSON object.
    Json,
}

impl Output {
    /// Sets up what is logged from here on; once a process.
    pub fn init(self) {
        let filter = EnvFilter::new(match self {
            Self::Person => "warn,flux_lora=info,flux_lora::events=off",
            Self::Quiet => "warn",
            Self::Json => "warn,flux_lora=info,flux_lora::bars=off",
        });
        if self == Self::Json {
            tracing_subscriber::registry()
                .with(filter)
                .with(JsonLines)
                .init();
            return;
        }
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| AboveBar)
            .with_ansi(colours(
                io::stderr().is_terminal(),
                std::env::var_os("NO_COLOR"),
            ))
            .with_target(false)
            .without_time()
            .init();
    }

    /// The result of a command: lines for a person (a line for each element of a list), an event named `event` for a program.
    ///
    /// # Errors
    /// A person's output that cannot be written to.
    pub fn result(self, event: &str, fields: &[(&str, Value)]) -> Result<(), OutputError> {
        if self == Self::Json {
            let mut object = Map::from_iter([("event".to_string(), json!(event))]);
            object.extend(
                fields
                    .iter()
                    .map(|(name, value)| ((*name).to_string(), value.clone())),
            );
            print_line(&Value::Object(object));
            return Ok(());
        }
        let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0) + 1;
        for (name, value) in fields {
            let name = format!("{}:", name.replace('_', " "));
            let values = match value {
                Value::Array(values) => values,
                value => std::slice::from_ref(value),
            };
            for value in values {
                match value {
                    Value::String(text) => say!("{name:width$} {}", printable(text))?,
                    value => say!("{name:width$} {value}")?,
                }
            }
        }
        Ok(())
    }

    /// A result that is text for people; for a program an event with its lines.
    ///
    /// # Errors
    /// A person's output that cannot be written to.
    pub fn text(self, event: &str, text: &str) -> Result<(), OutputError> {
        match self {
            Self::Json => {
                let lines: Vec<&str> = text.lines().collect();
                print_line(&json!({"event": event, "lines": lines}));
            }
            _ => print(text)?,
        }
        Ok(())
    }

    /// What went wrong: a line on stderr, and for a program an event too.
    pub fn error(self, message: &str) {
        if self == Self::Json {
            print_line(&json!({"event": "error", "message": message}));
        }
        let _ = writeln!(io::stderr(), "error: {message}"); // nobody else is there to be told
    }
}

/// Why standard output cannot be written to.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// Its reader is gone, as `head` is when it has its lines: the program ends, quietly and with 0.
    #[error("the reader of standard output is gone")]
    Closed,
    /// Anything else.
    #[error("cannot write to standard output")]
    Failed(#[source] io::Error),
}

/// Writes to standard output, at once.
pub(crate) fn print(text: impl fmt::Display) -> Result<(), OutputError> {
    let mut out = io::stdout().lock();
    let written = write!(out, "{text}").and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => OutputError::Closed,
        _ => OutputError::Failed(error),
    })
}

/// Prints a line, as `println!` does.
macro_rules! say {
    ($($text:tt)*) => {
        $crate::output::print(format_args!("{}\n", format_args!($($text)*)))
    };
}
pub(crate) use say;

/// Colours are for terminals, unless the person wants none (<https://no-color.org>).
fn colours(terminal: bool, no_color: Option<std::ffi::OsString>) -> bool {
    terminal && no_color.is_none_or(|value| value.is_empty())
}

/// A reader that is gone is no reason to stop a run.
fn print_line(value: &Value) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

/// Every event as a JSON object on a line of stdout: those for programs as they are, all others as `log`.
struct JsonLines;

impl<S: Subscriber> Layer<S> for JsonLines {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        print_line(&object(event));
    }
}

fn object(event: &Event<'_>) -> Value {
    let mut fields = Fields(Map::new());
    let metadata = event.metadata();
    if metadata.target() != EVENTS {
        let level = match *metadata.level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "info",
        };
        fields.0.insert("event".into(), json!("log"));
        fields.0.insert("level".into(), json!(level));
    }
    event.record(&mut fields);
    Value::Object(fields.0)
}

struct Fields(Map<String, Value>);

impl Fields {
    fn put(&mut self, field: &Field, value: impl Into<Value>) {
        self.0.insert(field.name().to_string(), value.into());
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value);
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value);
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value);
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value);
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value);
    }
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[test]
    fn no_color_takes_colours_away_unless_it_is_empty() {
        assert!(colours(true, None));
        assert!(colours(true, Some("".into())));
        assert!(!colours(true, Some("1".into())));
        assert!(!colours(false, None));
    }

    #[test]
    fn an_event_is_an_object_whose_numbers_are_numbers() {
        struct Keep(Arc<Mutex<Vec<Value>>>);
        impl<S: Subscriber> Layer<S> for Keep {
            fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
                self.0.lock().expect("one thread").push(object(event));
            }
        }
        let kept = Arc::new(Mutex::new(Vec::new()));
        let subscriber = tracing_subscriber::registry().with(Keep(kept.clone()));
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: EVENTS, event = "step", step = 3_u64, loss = 0.1, memory_mb = None::<f64>);
            tracing::warn!(count = 2, "an \"odd\" {}", "thing");
        });
        let kept = kept.lock().expect("one thread");
        assert_eq!(kept[0], json!({"event": "step", "step": 3, "loss": 0.1}));
        assert_eq!(
            kept[1],
            json!({"event": "log", "level": "warning", "message": "an \"odd\" thing", "count": 2})
        );
    }
}
