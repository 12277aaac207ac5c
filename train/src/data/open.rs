//! Files as streams of UTF-8 text: decompressed, without a byte-order mark.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;

use super::DataError;

/// A file that is being read.
pub(super) type Reader = Box<dyn BufRead + Send>;

/// Magic bytes of compressed files.
const GZIP: &[u8] = b"\x1f\x8b";
const ZSTD: &[u8] = b"\x28\xb5\x2f\xfd";
/// Unsupported compressions, with the program that decompresses them.
const OTHERS: [(&[u8], &str, &str); 3] =
    [(b"BZh", "bzip2", "bunzip2"), (b"\xfd7zXZ\x00", "xz", "unxz"), (b"PK\x03\x04", "zip", "unzip")];
const UTF8_MARK: &[u8] = b"\xef\xbb\xbf";
const UTF32_MARKS: [&[u8]; 2] = [b"\xff\xfe\0\0", b"\0\0\xfe\xff"];
const UTF16_MARKS: [&[u8]; 2] = [b"\xff\xfe", b"\xfe\xff"];

/// Opens a file: gzip and Zstandard are decompressed, a UTF-8 byte-order mark is skipped; other compressions, UTF-16
/// and UTF-32 are rejected by name.
pub(super) fn open(path: &Path) -> Result<Reader, DataError> {
    let file = File::open(path).map_err(DataError::read(path))?;
    let (begin, file) = peeked(file).map_err(DataError::read(path))?;
    let reader: Box<dyn Read + Send> = match begin.as_slice() {
        begin if begin.starts_with(GZIP) => Box::new(MultiGzDecoder::new(file)),
        begin if begin.starts_with(ZSTD) => Box::new(Frames::new(BufReader::new(file))),
        begin => match OTHERS.iter().find(|(magic, ..)| begin.starts_with(magic)) {
            Some((_, kind, program)) => {
                return Err(DataError::Encoding {
                    path: path.to_path_buf(),
                    problem: format!(
                        "is compressed by {kind}; decompress it with {program}, or compress it by gzip or zstd"
                    ),
                });
            }
            None => Box::new(file),
        },
    };
    let (begin, reader) = peeked(reader).map_err(DataError::read(path))?;
    if UTF32_MARKS.iter().any(|mark| begin.starts_with(mark)) {
        return Err(DataError::Encoding {
            path: path.to_path_buf(),
            problem: "is UTF-32 text; convert the file with `iconv -f UTF-32 -t UTF-8`".into(),
        });
    }
    if UTF16_MARKS.iter().any(|mark| begin.starts_with(mark)) {
        return Err(DataError::Encoding {
            path: path.to_path_buf(),
            problem: "is UTF-16 text; convert it with `iconv -f UTF-16 -t UTF-8`".into(),
        });
    }
    let mut reader = BufReader::with_capacity(1 << 16, reader);
    if begin.starts_with(UTF8_MARK) {
        reader.read_exact(&mut [0; UTF8_MARK.len()]).map_err(DataError::read(path))?;
    }
    Ok(Box::new(reader))
}

/// Returns the first bytes of a stream, and the stream including them.
fn peeked<R: Read + Send>(mut reader: R) -> std::io::Result<(Vec<u8>, impl Read + Send)> {
    let mut begin = Vec::new();
    (&mut reader).take(8).read_to_end(&mut begin)?;
    Ok((begin.clone(), std::io::Cursor::new(begin).chain(reader)))
}

/// Concatenated frames of a Zstandard file.
struct Frames<R: BufRead> {
    decoder: Option<StreamingDecoder<R, ruzstd::decoding::FrameDecoder>>,
    source: Option<R>,
}

impl<R: BufRead> Frames<R> {
    fn new(source: R) -> Self {
        Self { decoder: None, source: Some(source) }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            if let Some(decoder) = &mut self.decoder {
                let read = decoder.read(buffer)?;
                if read > 0 {
                    return Ok(read);
                }
                self.source = self.decoder.take().map(StreamingDecoder::into_inner);
            }
            let Some(mut source) = self.source.take() else { return Ok(0) };
            if source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.decoder = Some(StreamingDecoder::new(source).map_err(std::io::Error::other)?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn read(bytes: &[u8]) -> Result<String, DataError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, bytes).unwrap();
        let mut text = String::new();
        open(&path)?.read_to_string(&mut text).unwrap();
        Ok(text)
    }

    #[test]
    fn compressed_and_marked_files_give_their_text() {
        let text = "größe ≥ 1\n".repeat(20_000);
        assert_eq!(read(text.as_bytes()).unwrap(), text);
        assert_eq!(read(b"\xef\xbb\xbfmarked").unwrap(), "marked");
        assert_eq!(read(b"").unwrap(), "");
        let gzip = |text: &str| {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(text.as_bytes()).unwrap();
            gzip.finish().unwrap()
        };
        assert_eq!(read(&[gzip(&text), gzip("\u{feff}more")].concat()).unwrap(), format!("{text}\u{feff}more"));
        assert_eq!(read(&gzip("\u{feff}marked")).unwrap(), "marked");
        let zstd = |text: &str| {
            ruzstd::encoding::compress_to_vec(text.as_bytes(), ruzstd::encoding::CompressionLevel::Fastest)
        };
        assert_eq!(read(&[zstd(&text), zstd("more")].concat()).unwrap(), format!("{text}more"));
    }

    #[test]
    fn what_is_not_read_is_named() {
        for (bytes, part) in [
            (&b"\xff\xfe\0\0a\0\0\0"[..], "UTF-32"),
            (b"\0\0\xfe\xff\0\0\0a", "UTF-32"),
            (b"\xff\xfea\0", "UTF-16"),
            (b"\xfe\xff\0a", "UTF-16"),
            (b"BZh91AY", "bzip2"),
            (b"\xfd7zXZ\0\0", "xz"),
            (b"PK\x03\x04zip", "zip"),
        ] {
            let message = read(bytes).unwrap_err().to_string();
            assert!(message.contains(part) && message.contains("file"), "{message}");
        }
    }
}
