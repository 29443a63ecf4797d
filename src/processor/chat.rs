//! Chat templates: Jinja of the checkpoint's author, rendered in a sandbox with a limit on its work.

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value as JinjaValue, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde_json::Value;

use super::error::ProcessorError;
use super::folder::{read_json, read_text};
use super::text::special_token;

/// Template instructions that one rendering may run.
const FUEL: u64 = 2_000_000;
const SPECIAL_TOKENS: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// One turn of a chat.
#[derive(Debug, Clone, Copy)]
pub struct ChatMessage<'a> {
    /// `system`, `user` or `assistant`.
    pub role: &'a str,
    /// What it says.
    pub text: &'a str,
    /// Pictures shown before the text.
    pub pictures: usize,
}

/// A checkpoint's chat template.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    folder: PathBuf,
    source: String,
    special_tokens: Vec<(&'static str, Option<String>)>,
    multimodal: bool,
}

impl ChatTemplate {
    /// Reads chat_template.jinja, else chat_template.json, else the `chat_template` of tokenizer_config.json; `None`
    /// where the folder has none. `multimodal` says whether the checkpoint has a processor besides its tokenizer.
    ///
    /// # Errors
    /// A file is unreadable or malformed.
    pub fn open(folder: &Path, multimodal: bool) -> Result<Option<Self>, ProcessorError> {
        Self::open_parts(&[folder], multimodal)
    }

    /// As [`ChatTemplate::open`] where the files lie in several folders: the first folder that has a file gives it.
    pub(super) fn open_parts(folders: &[&Path], multimodal: bool) -> Result<Option<Self>, ProcessorError> {
        let config = read_json(folders, "tokenizer_config.json")?.unwrap_or(Value::Null);
        let source = match read_text(folders, "chat_template.jinja")? {
            Some(source) => Some(source),
            None => match read_json(folders, "chat_template.json")? {
                Some(values) => template_of(&values),
                None => template_of(&config),
            },
        };
        Ok(source.map(|source| Self {
            folder: folders.first().map_or_else(PathBuf::new, |folder| folder.to_path_buf()),
            source,
            special_tokens: SPECIAL_TOKENS.map(|name| (name, special_token(&config, name))).to_vec(),
            multimodal,
        }))
    }

    /// The prompt of a chat, with the opening of the assistant's turn, and whether the tokenizer is still to add its
    /// special tokens.
    ///
    /// # Errors
    /// The template is malformed, raises an exception or does more work than one rendering may.
    pub fn render(&self, messages: &[ChatMessage<'_>]) -> Result<(String, bool), ProcessorError> {
        let failed = |error: minijinja::Error| {
            let reason = match error.kind() {
                ErrorKind::OutOfFuel => "it does too much work".to_owned(),
                _ => error.to_string(),
            };
            ProcessorError::ChatTemplate { reason: format!("{reason} (in `{}`)", self.folder.display()) }
        };
        let environment = self.environment().map_err(failed)?;
        let template = environment.template_from_str(&self.source).map_err(failed)?;
        let parts = self.takes_parts();
        let messages = messages.iter().map(|message| message_value(message, parts));
        let mut values = vec![("messages", messages.collect::<JinjaValue>()), ("add_generation_prompt", true.into())];
        for (name, token) in &self.special_tokens {
            values.extend(token.as_ref().map(|token| (*name, token.into())));
        }
        let rendered = template.render(JinjaValue::from_pairs(values)).map_err(failed)?;
        let bos = self.special_tokens.iter().find(|(name, _)| *name == "bos_token");
        let has_bos = bos.and_then(|(_, token)| token.as_deref()).is_some_and(|token| rendered.starts_with(token));
        let add_special_tokens = self.multimodal && !has_bos;
        Ok((rendered, add_special_tokens))
    }

    fn environment(&self) -> Result<Environment<'_>, minijinja::Error> {
        let mut environment = Environment::new();
        // The whitespace rules that HF sets.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| {
            let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            strftime(&format, elapsed.as_secs())
        });
        Ok(environment)
    }

    /// Whether the template walks over typed parts, or wants a turn's text as it is.
    fn takes_parts(&self) -> bool {
        ["'type'", "\"type\"", ".type"].iter().any(|mark| self.source.contains(mark))
    }
}

/// The template under `chat_template`: a string, or a list of named ones of which `default` counts.
fn template_of(values: &Value) -> Option<String> {
    match values.get("chat_template")? {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"))
            .and_then(|entry| entry.get("template")?.as_str())
            .map(str::to_owned),
        _ => None,
    }
}

fn message_value(message: &ChatMessage<'_>, parts: bool) -> JinjaValue {
    if !parts {
        return context! { role => message.role, content => message.text };
    }
    let mut content = vec![JinjaValue::from_pairs([("type", "image")]); message.pictures];
    content.push(JinjaValue::from_pairs([("type", "text"), ("text", message.text)]));
    context! { role => message.role, content => content }
}

/// C's `strftime` for the fields that templates use, in UTC; `seconds` since 1970.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (mut day, second) = (seconds / 86_400, seconds % 86_400);
    let weekday = WEEKDAYS[(day % 7) as usize];
    let leap = |year: u64| (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400);
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 0;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    let name = MONTHS[month];
    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => text += &year.to_string(),
            Some('m') => text += &format!("{:02}", month + 1),
            Some('d') => text += &format!("{:02}", day + 1),
            Some('B') => text += name,
            Some('b') => text += &name[..3],
            Some('A') => text += weekday,
            Some('a') => text += &weekday[..3],
            Some('H') => text += &format!("{:02}", second / 3600),
            Some('M') => text += &format!("{:02}", second / 60 % 60),
            Some('S') => text += &format!("{:02}", second % 60),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str, multimodal: bool) -> ChatTemplate {
        ChatTemplate {
            folder: PathBuf::from("folder"),
            source: source.to_owned(),
            special_tokens: vec![("bos_token", Some("<s>".to_owned()))],
            multimodal,
        }
    }

    fn user(text: &str, pictures: usize) -> ChatMessage<'_> {
        ChatMessage { role: "user", text, pictures }
    }

    #[test]
    fn a_llava_template_puts_pictures_before_text() {
        let source = "{% for message in messages %}{{ message['role'].upper() + ': ' }}\
            {% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
            {% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}\
            {% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}";
        let (prompt, add) = template(source, true).render(&[user("What is it?", 2)]).expect("renders");
        assert_eq!(prompt, "USER: <image>\n<image>\nWhat is it? ASSISTANT:");
        assert!(add, "the tokenizer's BOS is still missing");
    }

    #[test]
    fn a_text_template_takes_strings_and_brings_its_bos() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n[{{ m.role }}] {{ m.content.strip() }}\n{% endfor %}";
        let (prompt, add) = template(source, true).render(&[user(" a <b> ", 0)]).expect("renders");
        assert_eq!(prompt, "<s>\n[user] a <b>\n");
        assert!(!add);
    }

    #[test]
    fn endless_and_raising_templates_are_refused() {
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}";
        let error = template(endless, false).render(&[]).expect_err("refused");
        assert_eq!(error.to_string(), "chat template: it does too much work (in `folder`)");
        let error = template("{{ raise_exception('roles must alternate') }}", false).render(&[]);
        assert!(error.expect_err("refused").to_string().contains("roles must alternate"));
    }

    #[test]
    fn dates() {
        assert_eq!(strftime("%d %b %Y %H:%M:%S %A", 951_827_696), "29 Feb 2000 12:34:56 Tuesday");
        assert_eq!(strftime("%Y-%m-%d%%%q", 1_798_675_199), "2026-12-30%%q");
        assert_eq!(strftime("%a %B", 0), "Thu January");
    }
}
