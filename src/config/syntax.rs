//! The two syntaxes, and what their errors and warnings look like.
//!
//! JSON with comments, trailing commas, and the missing comma of the published samples; TOML. Both are read straight
//! into our types, so that an error has a path and a line. Values are never quoted in messages: a URL with a password
//! in the wrong place would show in the log.

use std::cell::RefCell;
use std::collections::BTreeSet;

use jsonc_parser::ParseOptions;
use jsonc_parser::Scanner;
use jsonc_parser::ScannerOptions;
use jsonc_parser::errors::ParseErrorKind;
use jsonc_parser::tokens::Token;
use serde::Deserialize;
use serde::Deserializer;
use serde::de::DeserializeOwned;
use serde::de::Error as _;

use super::ConfigError;

/// A text with its syntax known and the missing commas of JSON put in.
pub(super) struct Text<'a> {
    text: std::borrow::Cow<'a, str>,
    syntax: Syntax,
    /// What was mended, for the log.
    pub(super) warnings: Vec<String>,
}

#[derive(Clone, Copy)]
enum Syntax {
    Json,
    Toml,
}

/// A document, and the paths of the keys that nobody asked for.
pub(super) struct Document<T> {
    pub(super) content: T,
    pub(super) unknown: BTreeSet<String>,
}

impl<'a> Text<'a> {
    /// Looks at the first character that is no comment: JSON begins with a brace, TOML cannot.
    pub(super) fn new(text: &'a str) -> Self {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        if !begins_like_json(text) {
            return Self { text: text.into(), syntax: Syntax::Toml, warnings: Vec::new() };
        }
        let missing = missing_commas(text);
        let warnings = missing
            .iter()
            .map(|&at| format!("a comma is missing at the end of line {}; read as if it were there", line_of(text, at)))
            .collect();
        let mut mended = text.to_owned();
        for at in missing.into_iter().rev() {
            mended.insert(at, ',');
        }
        Self { text: mended.into(), syntax: Syntax::Json, warnings }
    }

    /// Reads the whole text as a `T`.
    pub(super) fn read<T: DeserializeOwned>(&self) -> Result<Document<T>, ConfigError> {
        let unknown = RefCell::new(BTreeSet::new());
        UNKNOWN.with_borrow_mut(BTreeSet::clear);
        let content = match self.syntax {
            Syntax::Json => read_json(&self.text)?,
            Syntax::Toml => read_toml(&self.text)?,
        };
        UNKNOWN.with_borrow_mut(|seen| unknown.borrow_mut().append(seen));
        Ok(Document { content, unknown: unknown.into_inner() })
    }
}

thread_local! {
    /// Where [`Pathed`] leaves the unknown keys: a `Deserialize` impl has no other way to hand out a second result.
    static UNKNOWN: RefCell<BTreeSet<String>> = const { RefCell::new(BTreeSet::new()) };
}

/// A `T` whose errors begin with the path of the field, and whose unknown keys are noted in [`UNKNOWN`].
///
/// A type, since `jsonc_parser` has no public deserializer to wrap.
struct Pathed<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pathed<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        read_pathed(deserializer).map(Pathed).map_err(|(path, error)| {
            let error = without_values(&error.to_string());
            // An end too early has no name of a field yet.
            let path = path.trim_end_matches(".?");
            D::Error::custom(if path == "." || path == "?" { error } else { format!("{path}: {error}") })
        })
    }
}

fn read_pathed<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<T, (String, D::Error)> {
    let mut track = serde_path_to_error::Track::new();
    let mut note = |path: serde_ignored::Path<'_>| {
        UNKNOWN.with_borrow_mut(|seen| seen.insert(path.to_string().replace(".?", "")));
    };
    let tracked = serde_path_to_error::Deserializer::new(deserializer, &mut track);
    let result = T::deserialize(serde_ignored::Deserializer::new(tracked, &mut note));
    result.map_err(|error| (track.path().to_string(), error))
}

fn read_json<T: DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    let strict = ParseOptions {
        allow_comments: true,
        allow_trailing_commas: true,
        allow_missing_commas: false,
        allow_loose_object_property_names: false,
        allow_single_quoted_strings: false,
        allow_hexadecimal_numbers: false,
        allow_unary_plus_numbers: false,
        allow_bare_decimal_point_numbers: false,
        allow_non_finite_numbers: false,
        allow_extended_string_escapes: false,
    };
    jsonc_parser::parse_to_serde_value::<Pathed<T>>(text, &strict).map(|pathed| pathed.0).map_err(|error| {
        // `Pathed` has put the place of the fault into the text; what the outer call adds is line 1.
        ConfigError::Content(match error.kind() {
            ParseErrorKind::Custom(message) => message.clone(),
            _ => error.to_string(),
        })
    })
}

fn read_toml<T: DeserializeOwned>(text: &str) -> Result<T, ConfigError> {
    let place = |error: &toml::de::Error| match error.span() {
        Some(span) => format!(" on line {}", line_of(text, span.start)),
        None => String::new(),
    };
    let deserializer = toml::Deserializer::parse(text).map_err(|error| {
        let message = error.message().replace('\n', ", ");
        ConfigError::Content(format!("neither JSON, which begins with `{{`, nor TOML: {message}{}", place(&error)))
    })?;
    read_pathed(deserializer).map_err(|(path, error)| {
        let message = without_values(error.message());
        let message = if path == "." { message } else { format!("{path}: {message}") };
        ConfigError::Content(format!("{message}{}", place(&error)))
    })
}

/// `invalid type: string "http://me:word@host", expected a table` without what was quoted.
fn without_values(message: &str) -> String {
    let quoted = message.find("string \"").zip(message.rfind("\", expected "));
    match quoted {
        Some((from, to)) if from < to => format!("{}a string{}", &message[..from], &message[to + 1..]),
        _ => message.to_owned(),
    }
}

fn line_of(text: &str, at: usize) -> usize {
    text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count() + 1
}

fn begins_like_json(text: &str) -> bool {
    let mut rest = text.trim_start();
    loop {
        let after = if let Some(comment) = rest.strip_prefix("//") {
            comment.split_once('\n').map_or("", |(_, after)| after)
        } else if let Some(comment) = rest.strip_prefix("/*") {
            comment.split_once("*/").map_or("", |(_, after)| after)
        } else {
            return rest.starts_with('{');
        };
        rest = after.trim_start();
    }
}

/// Byte offsets at which a comma belongs: behind a value that a `"key":` on a later line follows.
fn missing_commas(text: &str) -> Vec<usize> {
    let options = ScannerOptions { allow_single_quoted_strings: false, ..ScannerOptions::default() };
    let mut scanner = Scanner::new(text, &options);
    let mut missing = Vec::new();
    let mut value_end = None;
    let mut suspect = None;
    // A text that cannot be scanned is refused by the parser afterwards, with the place.
    while let Ok(Some(token)) = scanner.scan() {
        match token {
            Token::CommentLine(_) | Token::CommentBlock(_) => continue,
            Token::Colon => missing.extend(suspect.take()),
            _ => suspect = None,
        }
        let on_later_line = |end: &usize| text.as_bytes()[*end..scanner.token_start()].contains(&b'\n');
        if matches!(token, Token::String(_)) {
            suspect = value_end.filter(on_later_line);
        }
        let ends_value = !matches!(token, Token::OpenBrace | Token::OpenBracket | Token::Comma | Token::Colon);
        value_end = ends_value.then(|| scanner.token_end());
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_comma_on_new_line_is_found_and_elsewhere_not() {
        for (text, expected) in [
            ("{\"a\": 1\n\"b\": 2}", vec![7]),
            ("{\"a\": 1 // why\n\"b\": 2}", vec![7]),
            ("{\"a\": {\"x\": 1}\n/* c */ \"b\": 2}", vec![14]),
            ("{\"a\": \"x\"\n\"b\": \"y\"\n\"c\": 3}", vec![9, 18]),
            ("{\"a\": 1 \"b\": 2}", vec![]),
            ("{\"a\": 1,\n\"b\": 2}", vec![]),
            ("[\"a\"\n\"b\"]", vec![]),
            ("{\"a\"\n: 1}", vec![]),
        ] {
            assert_eq!(missing_commas(text), expected, "{text}");
        }
    }

    #[test]
    fn quoted_values_are_cut_out() {
        let cut = without_values("invalid type: string \"http://a:b@c\", expected a table on line 3 column 4");
        assert_eq!(cut, "invalid type: a string, expected a table on line 3 column 4");
        assert_eq!(without_values("missing field `type`"), "missing field `type`");
    }
}
