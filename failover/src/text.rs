//! Texts for people that quote what a file, a client or the arbiter said.

/// Most characters that are quoted.
const MAX_CHARS: usize = 400;

/// The beginning of `text` on one line and without control characters: it must neither move a terminal's cursor, nor begin a line of its own
/// in a log, nor fill it.
pub fn harmless(text: &str) -> String {
    let one = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        c if c.is_control() => '?',
        c => c,
    };
    let mut short: String = text.chars().take(MAX_CHARS).map(one).collect();
    if text.chars().nth(MAX_CHARS).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left_and_no_novel() {
        assert_eq!(harmless(&"x".repeat(1000)).chars().count(), MAX_CHARS + 1);
        assert_eq!(harmless(&"x".repeat(MAX_CHARS)).chars().count(), MAX_CHARS);
        assert_eq!(harmless("a\x1b[2J\nb\u{85}\u{7f}ä"), "a?[2J b??ä");
    }
}
