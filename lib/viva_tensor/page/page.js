"use strict";
// One tab stop for each plot: arrow keys go from mark to mark.
for (const plot of document.querySelectorAll("figure.plot")) {
  const marks = [...plot.querySelectorAll(".mark")];
  const output = plot.querySelector("output");
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  const show = mark => {
    if (mark) output.textContent = mark.querySelector("title").textContent;
  };
  const stop = chosen => {
    for (const mark of marks) mark.setAttribute("tabindex", mark === chosen ? 0 : -1);
  };
  stop(marks[0]);
  plot.addEventListener("pointerover", event => show(event.target.closest(".mark")));
  plot.addEventListener("focusin", event => {
    const mark = event.target.closest(".mark");
    show(mark);
    if (mark) stop(mark);
  });
  plot.addEventListener("keydown", event => {
    const at = marks.indexOf(event.target.closest(".mark"));
    const step = steps[event.key];
    if (at < 0 || step === undefined) return;
    event.preventDefault();
    marks[Math.min(Math.max(at + step, 0), marks.length - 1)].focus();
  });
}
