//! The rules of the house that a compiler does not know, checked on the sources themselves.
//!
//! Rooms import downward only; `unsafe` lives in `sys`; the types of vhost stay in `device`; files have a purpose on
//! their first line and end before they are too long. Tests are free: they may look up, and into other rooms.

use std::fs;
use std::path::Path;
use std::path::PathBuf;

/// The rooms from the street inwards. `lib.rs` lists the same; `ARCHITECTURE.md` says what each is for.
const ROOMS: [&str; 15] = [
    "testing", "bin", "cli", "daemon", "config", "device", "vfs", "fs", "fuse", "builder", "storage", "rafs",
    "metrics", "sys", "limits",
];

/// Files beside the rooms: the crate's front page, and what runs before it is compiled.
const OUTSIDE: [&str; 2] = ["lib", "build"];

/// Neighbours that do not know each other, although one stands above the other: `daemon` wires them.
const STRANGERS: [(&str, &str); 1] = [("config", "device")];

/// Crates whose types stay in the rooms named; `testing` plays the other side with them.
const KEPT: [(&str, &[&str]); 4] = [
    ("vhost", &["device", "testing"]),
    ("vhost_user_backend", &["device", "testing"]),
    ("virtio_queue", &["device", "testing"]),
    ("fuse_backend_rs", &["fs", "device", "testing"]),
];

/// Lines that a file may have.
const MAX_LINES: usize = 600;

/// Files that may be longer, each with its reason.
const LONGER: [(&str, &str); 0] = [];

/// A source file below `src`.
struct Source {
    /// Relative to `src`.
    path: PathBuf,
    text: String,
}

impl Source {
    fn room(&self) -> &str {
        let first = self.path.iter().next().and_then(|first| first.to_str()).unwrap_or_default();
        first.strip_suffix(".rs").unwrap_or(first)
    }

    /// Whether the whole file is a test.
    fn is_test(&self) -> bool {
        let stem = self.path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let in_tests = self.path.iter().any(|part| part == "tests");
        in_tests || stem == "tests" || stem.ends_with("_tests") || stem.starts_with("test_")
    }

    /// The program in it: neither comments nor strings, nor what follows `#[cfg(test)]` for tests at the end.
    fn code(&self) -> String {
        let code = code_only(&self.text);
        let tests = ["#[cfg(test)]\nmod ", "#[cfg(all(test"];
        let end = tests.iter().filter_map(|mark| code.find(mark)).filter(|at| code[*at..].contains('{')).min();
        code[..end.unwrap_or(code.len())].to_owned()
    }

    /// Modules around the code of this file, itself included: how many `super` lead to the crate's root.
    fn depth(&self) -> usize {
        let parts = self.path.iter().count();
        match self.path.file_stem().is_some_and(|stem| stem == "mod") {
            true => parts - 1,
            false => parts,
        }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = Vec::new();
    let mut pending = vec![root.clone()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                sources.push(Source { path: path.strip_prefix(&root).unwrap().to_path_buf(), text });
            }
        }
    }
    assert!(sources.len() > 20, "the sources are here");
    sources
}

/// `text` with comments and the insides of strings and characters made blank. Knows nothing of nested block comments
/// or of raw strings that hold `"#`.
fn code_only(text: &str) -> String {
    #[derive(Clone, Copy, PartialEq)]
    enum In {
        Code,
        Line,
        Block,
        Text,
        Raw,
    }
    let mut state = In::Code;
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let (next, taken) = match state {
            In::Code if rest.starts_with("//") => (In::Line, 2),
            In::Code if rest.starts_with("/*") => (In::Block, 2),
            In::Code if rest.starts_with("r#\"") => (In::Raw, 3),
            In::Code if rest.starts_with("'\"'") || rest.starts_with("'/'") => (In::Code, 3),
            In::Code if rest.starts_with('"') => (In::Text, 1),
            In::Line if first == '\n' => (In::Code, 1),
            In::Block if rest.starts_with("*/") => (In::Code, 2),
            In::Text if first == '\\' => (In::Text, 1 + rest.chars().nth(1).map_or(0, char::len_utf8)),
            In::Text if first == '"' => (In::Code, 1),
            In::Raw if rest.starts_with("\"#") => (In::Code, 2),
            same => (same, first.len_utf8()),
        };
        let is_shown = state == In::Code && next == In::Code && taken == first.len_utf8();
        code.push(if is_shown || first == '\n' { first } else { ' ' });
        state = next;
        rest = &rest[taken..];
    }
    code
}

/// The rest of the word after every `prefix` that begins a word or path.
fn words_after<'a>(code: &'a str, prefix: &'a str) -> impl Iterator<Item = &'a str> {
    code.match_indices(prefix).filter(|(at, _)| begins_word(code, *at)).map(move |(at, _)| {
        let rest = &code[at + prefix.len()..];
        &rest[..rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())]
    })
}

fn begins_word(code: &str, at: usize) -> bool {
    !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '$')
}

fn place(room: &str) -> Option<usize> {
    ROOMS.iter().position(|known| *known == room)
}

/// The first rule that a use of `used` in `room` breaks.
fn objection(room: &str, used: &str) -> Option<String> {
    let (from, to) = (place(room)?, place(used)?);
    if from > to {
        return Some(format!("{room} is below {used}"));
    }
    STRANGERS
        .iter()
        .find(|(a, b)| (*a, *b) == (room, used) || (*b, *a) == (room, used))
        .map(|_| format!("{room} and {used} do not know each other"))
}

fn assert_none(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn every_source_is_in_a_known_room() {
    let strange =
        sources().into_iter().filter(|source| !OUTSIDE.contains(&source.room()) && place(source.room()).is_none());
    assert_none(&strange.map(|source| format!("{:?} is in no room", source.path)).collect::<Vec<_>>());
}

#[test]
fn every_room_is_on_the_map() {
    let map = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("ARCHITECTURE.md")).unwrap();
    let missing = ROOMS
        .iter()
        .filter(|room| ![format!("| `{room}/` |"), format!("| `{room}.rs` |")].iter().any(|row| map.contains(row)));
    assert_none(&missing.map(|room| format!("{room} is not in ARCHITECTURE.md")).collect::<Vec<_>>());
}

#[test]
fn imports_run_downward() {
    let mut complaints = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        let code = source.code();
        // As many `super` as the file is deep lead to the root, where the rooms are.
        let to_root = "super::".repeat(source.depth());
        for prefix in ["crate::", "nydus_vm::", &to_root] {
            let used = words_after(&code, prefix).filter_map(|used| objection(source.room(), used));
            complaints.extend(used.map(|objection| format!("{:?}: {objection}", source.path)));
        }
    }
    assert_none(&complaints);
}

#[test]
fn unsafe_is_at_home_in_sys_only() {
    let elsewhere = sources().into_iter().filter(|source| source.room() != "sys").filter(|source| {
        let code = code_only(&source.text);
        words_after(&code, "unsafe").any(|rest| rest.is_empty() || rest == "_code")
    });
    assert_none(&elsewhere.map(|source| format!("{:?} has unsafe code", source.path)).collect::<Vec<_>>());
}

#[test]
fn types_of_the_transport_stay_in_their_rooms() {
    let mut complaints = Vec::new();
    for source in sources() {
        let code = code_only(&source.text);
        for (name, rooms) in KEPT {
            let is_used = words_after(&code, &format!("{name}::")).next().is_some();
            if is_used && !rooms.contains(&source.room()) {
                complaints.push(format!("{:?} uses {name}, which stays in {rooms:?}", source.path));
            }
        }
    }
    assert_none(&complaints);
}

#[test]
fn files_say_their_purpose_and_end_in_time() {
    let mut complaints = Vec::new();
    for source in sources() {
        if !source.text.starts_with("//! ") {
            complaints.push(format!("{:?} does not begin with its purpose", source.path));
        }
        let lines = source.text.lines().count();
        if lines > MAX_LINES && !LONGER.iter().any(|(path, _)| source.path == Path::new(path)) {
            complaints
                .push(format!("{:?} has {lines} lines, at most {MAX_LINES} are easy to keep in mind", source.path));
        }
    }
    assert_none(&complaints);
}

#[test]
fn imports_are_one_item_per_line() {
    let grouped = sources().into_iter().filter(|source| {
        let code = code_only(&source.text);
        code.lines().any(|line| line.trim_start().trim_start_matches("pub ").starts_with("use ") && line.contains('{'))
    });
    assert_none(&grouped.map(|source| format!("{:?} groups imports", source.path)).collect::<Vec<_>>());
}

#[test]
fn checks_find_what_they_look_for() {
    let code = code_only(
        "use crate::a; // crate::b\n/* crate::c */ \"crate::d \\\" crate::e\" x::crate::f r#\"crate::g\"# crate::h",
    );
    assert_eq!(words_after(&code, "crate::").collect::<Vec<_>>(), ["a", "h"]);
    assert_eq!(objection("rafs", "storage").as_deref(), Some("rafs is below storage"));
    assert_eq!(objection("config", "device").as_deref(), Some("config and device do not know each other"));
    assert_eq!(objection("device", "config").as_deref(), Some("device is below config"));
    assert_eq!(objection("storage", "rafs"), None);
    assert_eq!(objection("storage", "storage"), None);
}
