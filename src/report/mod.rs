//! What a command prints: data on standard output, everything else on standard error.
mod format;
mod memory;

pub use format::{bytes, duration, table};
pub use memory::peak_memory;

use crate::failure::{Exit, Failure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;
use std::io::{ErrorKind, IsTerminal, Write};
use std::time::{Duration, Instant};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProgressMode {
    /// A bar on a terminal, lines elsewhere.
    Auto,
    Bar,
    /// One line at the end of each step.
    Plain,
    None,
}

#[derive(Debug)]
pub struct Printer {
    quiet: u8,
    verbose: u8,
    json: bool,
    color: bool,
    bar: bool,
    lines: bool,
}

impl Printer {
    pub fn new(quiet: u8, verbose: u8, json: bool, color: Color, progress: ProgressMode) -> Printer {
        let set = |name| std::env::var_os(name).is_some_and(|value: std::ffi::OsString| !value.is_empty());
        let terminal = std::io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => !set("NO_COLOR") && (terminal || set("CLICOLOR_FORCE")),
        };
        let bar = match progress {
            ProgressMode::Bar => true,
            ProgressMode::Auto => terminal && !set("CI"),
            ProgressMode::Plain | ProgressMode::None => false,
        };
        let lines = progress != ProgressMode::None;
        Printer { quiet, verbose, json, color, bar: bar && quiet == 0, lines: lines && quiet == 0 }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    pub fn is_verbose(&self) -> bool {
        self.verbose > 0
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn error_line(&self, text: &str) {
        // Nobody is left to be told that standard error is gone.
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    /// A step, as cargo shows them: the verb in its own column.
    pub fn status(&self, verb: &str, text: &str) {
        if self.quiet == 0 {
            self.error_line(&format!("{} {text}", self.paint("1;32", &format!("{verb:>12}"))));
        }
    }

    pub fn warning(&self, text: &str) {
        if self.quiet < 2 {
            self.error_line(&format!("{} {text}", self.paint("1;33", &format!("{:>12}", "warning"))));
        }
    }

    /// Only with `-v`.
    pub fn note(&self, text: &str) {
        if self.verbose > 0 {
            self.error_line(&format!("{:>12} {text}", "note"));
        }
    }

    pub fn failure(&self, failure: &Failure) {
        let mut text = format!("{} {}", self.paint("1;31", "error:"), failure.message);
        for cause in &failure.causes {
            text += &format!("\n  {} {cause}", self.paint("1", "cause:"));
        }
        if let Some(hint) = &failure.hint {
            text += &format!("\n  {} {hint}", self.paint("1;36", "hint:"));
        }
        self.error_line(&text);
    }

    /// A piece of standard output as it is. A reader that has gone (`| head`) ends the program without a word.
    pub fn raw(&self, text: &str) {
        let mut out = std::io::stdout();
        if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            if error.kind() == ErrorKind::BrokenPipe {
                std::process::exit(0);
            }
            self.failure(&Failure::new(Exit::Environment, format!("cannot write the result: {error}")));
            std::process::exit(Exit::Environment as i32);
        }
    }

    pub fn data(&self, text: &str) {
        self.raw(&format!("{}\n", text.trim_end_matches('\n')));
    }

    pub fn json(&self, value: &Value) {
        self.data(&serde_json::to_string_pretty(value).unwrap_or_default());
    }

    /// A step whose amount is known: a bar, or one line when it is done.
    pub fn progress(&self, verb: &str, text: &str, total: u64) -> Progress {
        let bar = self.bar.then(|| {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template(
                "{prefix:>12.bold.green} {msg} [{bar:30}] {percent:>3}% {elapsed}, {eta} left",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar.set_prefix(verb.to_owned());
            bar.set_message(text.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Progress { bar, start: Instant::now() }
    }

    /// The line that ends a step, with the time it took.
    pub fn finish(&self, progress: Progress, verb: &str, text: &str) {
        let elapsed = progress.start.elapsed();
        drop(progress);
        if self.lines {
            self.status(verb, &format!("{text} in {}", duration(elapsed)));
        }
    }
}

/// A step under way; dropping it takes its bar away.
pub struct Progress {
    bar: Option<ProgressBar>,
    start: Instant,
}

impl Progress {
    pub fn set(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
