//! Files with a sequence of JSON values: one per line, or in an array.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use super::DataError;
use super::json::Json;
use super::open::{Reader, open};

/// Reads the values of a file, one at a time.
pub(super) struct JsonLines {
    path: PathBuf,
    reader: Reader,
    line: u64,
    /// True if the file is a single array, whose items are the values.
    array: bool,
    /// True after the end of the array was read.
    done: bool,
}

impl JsonLines {
    pub fn open(path: PathBuf) -> Result<Self, DataError> {
        let mut reader = open(&path)?;
        let mut line = 0;
        // An array starts with its bracket; the items are read as values.
        let array = loop {
            let space = reader.fill_buf().map_err(DataError::read(&path))?;
            let blank = space.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            if blank < space.len() || space.is_empty() {
                break space.get(blank) == Some(&b'[');
            }
            line += space.iter().filter(|byte| **byte == b'\n').count() as u64;
            reader.consume(blank);
        };
        let mut lines = Self { path, reader, line, array, done: false };
        if array {
            lines.line += 1;
            lines.skip(|byte| byte == b'[' || byte.is_ascii_whitespace())?;
        }
        Ok(lines)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the next value, parsed by `read` from its bytes, with its line number, from 1; empty lines are skipped.
    pub fn next<T>(
        &mut self,
        read: impl FnOnce(&[u8]) -> serde_json::Result<T>,
    ) -> Result<Option<(u64, T)>, DataError> {
        let Some(bytes) = (if self.array { self.item()? } else { self.one_line()? }) else { return Ok(None) };
        let line = self.line;
        if self.array {
            self.line += bytes.iter().filter(|byte| **byte == b'\n').count() as u64;
        }
        let value = read(&bytes).map_err(|error| DataError::Json {
            path: self.path.clone(),
            line,
            message: error.to_string(),
        })?;
        Ok(Some((line, value)))
    }

    /// Same as [`JsonLines::next`], for a whole value.
    pub fn next_value(&mut self) -> Result<Option<(u64, Json)>, DataError> {
        self.next(|bytes| serde_json::from_slice(bytes))
    }

    fn one_line(&mut self) -> Result<Option<Vec<u8>>, DataError> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            self.line += 1;
            if self.reader.read_until(b'\n', &mut bytes).map_err(DataError::read(&self.path))? == 0 {
                return Ok(None);
            }
            if !bytes.trim_ascii().is_empty() {
                return Ok(Some(bytes));
            }
        }
    }

    /// Bytes of the next item of an array, up to its comma.
    fn item(&mut self) -> Result<Option<Vec<u8>>, DataError> {
        if self.done {
            return Ok(None);
        }
        self.skip(|byte| byte == b',' || byte.is_ascii_whitespace())?;
        let mut bytes = Vec::new();
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        loop {
            let buffer = self.reader.fill_buf().map_err(DataError::read(&self.path))?;
            if buffer.is_empty() {
                // The parser reports what is missing.
                return Ok(Some(bytes));
            }
            let mut used = 0;
            let mut ended = false;
            for byte in buffer {
                match byte {
                    _ if escaped => escaped = false,
                    b'\\' if quoted => escaped = true,
                    b'"' => quoted = !quoted,
                    _ if quoted => {}
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' if depth > 0 => depth -= 1,
                    b']' | b',' if depth == 0 => ended = true,
                    _ => {}
                }
                if ended {
                    break;
                }
                used += 1;
            }
            bytes.extend_from_slice(&buffer[..used]);
            self.reader.consume(used);
            if ended {
                let bytes = bytes.trim_ascii().to_vec();
                return Ok(if bytes.is_empty() { self.end()? } else { Some(bytes) });
            }
        }
    }

    /// Rejects content after the closing bracket.
    fn end(&mut self) -> Result<Option<Vec<u8>>, DataError> {
        self.skip(|byte| byte == b']' || byte.is_ascii_whitespace())?;
        match (&mut self.reader).take(1).bytes().next() {
            None => {
                self.done = true;
                Ok(None)
            }
            Some(_) => Err(DataError::Json {
                path: self.path.clone(),
                line: self.line,
                message: "the file goes on behind its array".into(),
            }),
        }
    }

    fn skip(&mut self, skipped: impl Fn(u8) -> bool) -> Result<(), DataError> {
        loop {
            let buffer = self.reader.fill_buf().map_err(DataError::read(&self.path))?;
            let count = buffer.iter().take_while(|byte| skipped(**byte)).count();
            self.line += buffer[..count].iter().filter(|byte| **byte == b'\n').count() as u64;
            let done = count < buffer.len() || buffer.is_empty();
            self.reader.consume(count);
            if done {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(text: &str) -> Result<Vec<(u64, String)>, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.json");
        std::fs::write(&path, text).unwrap();
        let mut lines = JsonLines::open(path)?;
        let mut found = Vec::new();
        while let Some((line, value)) = lines.next_value()? {
            found.push((line, value.sorted_text()));
        }
        assert!(lines.next_value()?.is_none(), "the end stays the end");
        Ok(found)
    }

    #[test]
    fn lines_and_arrays_give_the_same_values() {
        let expected = |lines: [u64; 3]| {
            let texts = [r#"{"a":"x ] , \" [ "}"#, r#"{"b":[1,{"c":2}]}"#, "3"];
            lines.into_iter().zip(texts.map(String::from)).collect::<Vec<_>>()
        };
        let lines = "\n{\"a\": \"x ] , \\\" [ \"}\n\n{\"b\": [1, {\"c\": 2}]}\n3";
        assert_eq!(values(lines).unwrap(), expected([2, 4, 5]));
        let array = "\n [{\"a\": \"x ] , \\\" [ \"},\n{\"b\":\n [1, {\"c\": 2}]},\n 3 ]\n";
        assert_eq!(values(array).unwrap(), expected([2, 3, 5]));
        for empty in ["", "\n\n", "[]", " [ ]\n"] {
            assert_eq!(values(empty).unwrap(), []);
        }
    }

    #[test]
    fn bad_json_is_refused_by_line() {
        for (text, line) in [
            ("{\"a\": 1}\n{\"a\": ", 2),
            ("{\"a\": 1} 2", 1),
            ("[{\"a\": 1},\n{\"a\": ]", 2),
            ("[{\"a\": 1}", 1),
            ("[1]\n{}", 2),
        ] {
            let message = values(text).unwrap_err().to_string();
            assert!(message.contains(&format!("file.json line {line}")), "{text}: {message}");
        }
    }
}
