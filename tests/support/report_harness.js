"use strict";

// Looks into the pages in the frames, presses headings, and writes what it finds into the page.
const findings = {};

function contrast(one, other) {
  const [high, low] = [one, other].map(luminance).sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}

function luminance(color) {
  const linear = color.map((part) => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
}

function parse(color) {
  const parts = color.match(/[\d.]+/g).map(Number);
  return { color: parts.slice(0, 3), opacity: parts.length > 3 ? parts[3] : 1 };
}

function over(top, opacity, below) {
  return top.map((part, index) => opacity * part + (1 - opacity) * below[index]);
}

function backgroundOf(element, view) {
  for (let each = element; each; each = each.parentElement) {
    const { color, opacity } = parse(view.getComputedStyle(each).backgroundColor);
    if (opacity > 0) return color;
  }
  return [255, 255, 255];
}

// What lies under a text of a plot: the filled shapes before it that hold its middle.
function belowText(text, back, view) {
  const box = text.getBoundingClientRect();
  const [x, y] = [(box.left + box.right) / 2, (box.top + box.bottom) / 2];
  for (const shape of text.ownerSVGElement.querySelectorAll("path")) {
    if (shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_PRECEDING) break;
    const style = view.getComputedStyle(shape);
    const frame = shape.getBoundingClientRect();
    if (style.fill === "none" || x < frame.left || x > frame.right) continue;
    if (y < frame.top || y > frame.bottom) continue;
    const { color } = parse(style.fill);
    back = over(color, Number(style.opacity) * Number(style.fillOpacity), back);
  }
  return back;
}

function worstContrast(page, view) {
  const found = [];
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim()) continue;
    if (["style", "script", "title", "desc"].includes(element.localName)) continue;
    const style = view.getComputedStyle(element);
    let back = backgroundOf(element, view);
    let front = parse(style.color).color;
    if (element.localName === "text") {
      front = parse(style.fill).color;
      back = belowText(element, back, view);
    }
    found.push([contrast(front, back), node.data.slice(0, 40)]);
  }
  return found.sort(([a], [b]) => a - b)[0];
}

function plotsOf(page) {
  return [...page.querySelectorAll("svg.plot")].map((svg) => {
    const frame = svg.getBoundingClientRect();
    const outside = (box) =>
      box.left < frame.left - 1 || box.right > frame.right + 1 ||
      box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
    const marks = [...svg.querySelectorAll("path, use")].filter((mark) => !mark.closest("defs"));
    const boxes = marks.map((mark) => mark.getBoundingClientRect());
    const shapes = marks.filter((mark) => mark.style.fill !== "none")  // lines may have no length
      .map((mark) => mark.getBoundingClientRect());
    const texts = [...svg.querySelectorAll("text")];
    return {
      section: svg.closest("section").id,
      role: svg.getAttribute("role"),
      text: svg.querySelector(":scope > desc").textContent,
      words: [...svg.closest("section").querySelectorAll("details li")]
        .map((each) => each.textContent),
      marks: marks.length,
      empty: shapes.filter((box) => box.width <= 0 && box.height <= 0).length,
      outside: boxes.filter(outside).length,
      cut: texts.filter((text) => outside(text.getBoundingClientRect()))
        .map((text) => text.textContent),
    };
  });
}

function pressed(page, title, heading) {
  const section = [...page.querySelectorAll("section.table")]
    .find((each) => each.querySelector("h3").textContent === title);
  const headings = [...section.querySelectorAll("th")];
  const column = headings.findIndex((each) => each.textContent === heading);
  const button = headings[column].querySelector("button");
  const told = [];
  for (let press = 0; press < 2; press++) {
    button.focus();
    button.click();
    told.push({
      focused: page.activeElement === button,
      sorts: headings.map((each) => each.getAttribute("aria-sort")).filter((s) => s !== "none"),
      column: [...section.querySelectorAll("tbody tr")].map((row) => row.cells[column].textContent),
    });
  }
  return told;
}

window.addEventListener("load", () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument;
    const view = frame.contentWindow;
    const ids = [...page.querySelectorAll("[id]")].map((each) => each.id);
    const sections = [...page.querySelectorAll("main > section")];
    findings[frame.name] = {
      width: page.documentElement.scrollWidth,
      background: view.getComputedStyle(page.body).backgroundColor,
      contrast: worstContrast(page, view),
      answered: page.querySelector(".answer").getBoundingClientRect().bottom,
      facts: [...page.querySelectorAll(".answer dt")].map((each) => each.textContent),
      last: sections[sections.length - 1].id,
      plots: plotsOf(page),
      loads: view.performance.getEntriesByType("resource").map((each) => each.name),
      repeated: ids.filter((id, index) => ids.indexOf(id) !== index),
      dead: [...page.querySelectorAll("a")].map((each) => each.getAttribute("href"))
        .filter((link) => !link.startsWith("#") || !page.getElementById(link.slice(1))),
      elements: [...new Set([...page.querySelectorAll("*")].map((each) => each.localName))].sort(),
      scripts: page.querySelectorAll("script").length,
      handlers: [...page.querySelectorAll("*")]
        .filter((each) => each.getAttributeNames().some((name) => name.startsWith("on"))).length,
      hacked: "hacked" in window || "hacked" in view,
      pressed: JSON.parse(frame.dataset.press).map(([title, heading]) =>
        pressed(page, title, heading)),
    };
  }
  const result = document.createElement("pre");
  result.id = "findings";
  result.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(findings))));
  document.body.append(result);
});
