//! Texts for people that quote what a file, a client or the arbiter said.

/// `text` on one line and without control characters: it must neither move a terminal's cursor nor begin a line of its own in a log.
pub fn harmless(text: &str) -> String {
    let one = |c: char| match c {
        '\n' | '\r' | '\t' => ' ',
        c if c.is_control() => '?',
        c => c,
    };
    text.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_is_left() {
        assert_eq!(harmless("a\x1b[2J\nb\u{85}\u{7f}ä"), "a?[2J b??ä");
    }
}
