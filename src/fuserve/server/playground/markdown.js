// A little Markdown, built from elements and text nodes only: nothing a model writes is ever
// parsed as HTML.

const FENCE = /^\s*(```|~~~)\s*([\w+#.-]*)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^\s*[-*+]\s+(.*)$/;
const NUMBER = /^\s*(\d{1,9})[.)]\s+(.*)$/;
const INLINE = [
  [/`([^`\n]+)`/, (found) => element("code", found[1])],
  [/\*\*(?=\S)(.+?\S)\*\*/, (found) => withInline("strong", found[1])],
  [/(?<![\w*])\*(?=[^\s*])([^*\n]*[^\s*])\*(?![\w*])/, (found) => withInline("em", found[1])],
  [/\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/, (found) => link(found[1], found[2])],
];

/** Show a text in an element, in place of what was there. */
export function renderMarkdown(target, text) {
  target.replaceChildren(...blocks(text.split("\n")));
}

function blocks(lines) {
  const made = [];
  let at = 0;
  const collect = (pattern) => {
    const taken = [];
    for (let found; at < lines.length && (found = pattern.exec(lines[at])); at += 1) {
      taken.push(found);
    }
    return taken;
  };
  while (at < lines.length) {
    const line = lines[at];
    const heading = HEADING.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (FENCE.test(line)) {
      const [block, next] = fenced(lines, at);
      made.push(block);
      at = next;
    } else if (heading) {
      // The page has its own h1 and h2.
      made.push(withInline(`h${Math.min(heading[1].length + 2, 6)}`, heading[2]));
      at += 1;
    } else if (BULLET.test(line)) {
      made.push(list("ul", collect(BULLET).map((found) => found[1])));
    } else if (NUMBER.test(line)) {
      const items = collect(NUMBER);
      const numbered = list("ol", items.map((found) => found[2]));
      numbered.start = Number(items[0][1]);
      made.push(numbered);
    } else {
      const begin = at;
      do at += 1; while (at < lines.length && lines[at].trim() && !startsBlock(lines[at]));
      made.push(withInline("p", lines.slice(begin, at).join("\n")));
    }
  }
  return made;
}

const startsBlock = (line) =>
  [FENCE, HEADING, BULLET, NUMBER].some((pattern) => pattern.test(line));

/** A code block, which may still be open, and the line after it. */
function fenced(lines, begin) {
  const [, fence, language] = FENCE.exec(lines[begin]);
  let end = begin + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  const pre = element("pre");
  if (language) pre.dataset.language = language;
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.append(element("code", lines.slice(begin + 1, end).join("\n")));
  return [pre, end + 1];
}

function list(name, items) {
  const made = element(name);
  made.append(...items.map((item) => withInline("li", item)));
  return made;
}

function withInline(name, text) {
  const made = element(name);
  made.append(...inline(text));
  return made;
}

function inline(text) {
  let first = null;
  for (const [pattern, make] of INLINE) {
    const found = pattern.exec(text);
    if (found && (!first || found.index < first.found.index)) first = { found, make };
  }
  if (!first) return text ? [text] : [];
  const { found, make } = first;
  const rest = text.slice(found.index + found[0].length);
  return [...(found.index ? [text.slice(0, found.index)] : []), make(found), ...inline(rest)];
}

function link(text, address) {
  const made = element("a", text);
  made.href = address; // http or https: the pattern admits nothing else
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}

function element(name, text = "") {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
