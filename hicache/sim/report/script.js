"use strict";
(() => {
  const tip = document.getElementById("tip");
  document.addEventListener("pointermove", (event) => {
    const found = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.style.opacity = found ? 1 : 0;
    if (!found) return;
    tip.textContent = found.dataset.tip;
    const left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8);
    tip.style.left = left + "px";
    tip.style.top = (event.clientY + 16) + "px";
  });
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const off = button.classList.toggle("off");
      for (const part of document.querySelectorAll("[data-series]")) {
        if (part.dataset.series === button.dataset.of) part.classList.toggle("off", off);
      }
    });
  }
  const pick = document.getElementById("pick");
  const show = () => {
    for (const part of document.querySelectorAll("[data-point]")) {
      part.classList.toggle("hide", part.dataset.point !== pick.value);
    }
  };
  if (pick) { pick.addEventListener("change", show); show(); }
})();
